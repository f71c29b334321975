"""Certificates, keys and the register: what an outside TLS library and Flower make of them, and who is kept out."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.cli.flower_supernode import load_ssh_private_key
from typer.testing import CliRunner

from legolm.cli.app import app
from legolm.errors import LegolmError
from legolm.system import DiskFullError
from legolm.trust import (
    add_device,
    make_authority,
    make_key,
    make_server,
    pem_of,
    read_devices,
    revoke_device,
    write_secret,
)


def said(*words: object) -> str:
    """What a command prints."""
    found = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def refused(*words: object) -> str:
    """The one line of what a command refuses."""
    error = CliRunner().invoke(app, [str(word) for word in words]).exception
    assert isinstance(error, LegolmError)
    return str(error)


def shake_hands(home: Path, ca: Path, host: str) -> None:
    """One TLS connection with the home's certificate, checked by a client that trusts `ca` and wants `host`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(home / "server.pem", home / "server.key")
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(there, server_side=True).close()
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(here, server_hostname=host).close()
    finally:
        here.close()
        thread.join()


def test_two_commands_make_a_trial(tmp_path: Path) -> None:
    home, device = tmp_path / "federation", tmp_path / "fr"
    said("certs", "init", home, "--host", "fl.example.org")
    said("certs", "client", device, "--register", home)
    for host in ("fl.example.org", "localhost", "127.0.0.1"):
        shake_hands(home, device / "ca.pem", host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(home, device / "ca.pem", "other.example.org")
    make_authority(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(home, tmp_path / "other" / "ca.pem", "localhost")
    # Flower's own node reads the key, and shows itself by what is registered.
    key = load_ssh_private_key((device / "device.key").read_bytes(), None)
    assert public_key_to_bytes(key.public_key()) == pem_of(read_devices(home)[0].key)  # type: ignore[arg-type]
    for secret in (home / "ca.key", home / "server.key", device / "device.key"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert "has a certificate authority already" in refused("certs", "init", home)
    (tmp_path / "file").write_text("")
    for command in (("certs", "init"), ("certs", "client")):
        assert f"{tmp_path / 'file'} is a file; give another folder" in refused(*command, tmp_path / "file" / "x")
    assert "has a key already" in refused("certs", "client", device)


@pytest.mark.parametrize("host", ["", "http://x", "a" * 64, "ab." * 85 + "ab", "fl..example.org", "ünter.example.org"])
def test_a_host_that_is_none_leaves_nothing_behind(tmp_path: Path, host: str) -> None:
    assert f"--host {host!r}: is no host name or address" in refused("certs", "init", tmp_path / "one", "--host", host)
    assert not (tmp_path / "one").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(full_disk: Path) -> None:
    for command in (("certs", "init"), ("certs", "client")):
        assert "x: the disk is full; free some space or give another folder" in refused(*command, full_disk / "x")
    (full_disk / "filler").write_bytes(bytes(60_000))  # there is some, and not enough
    with pytest.raises(DiskFullError, match="key: the disk is full"):
        write_secret(full_disk / "key", bytes(20_000))
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


def test_the_register(tmp_path: Path) -> None:
    home = tmp_path / "federation"
    public = {name: make_key(tmp_path / name) for name in ("fr", "de", "es")}
    roster = ("devices", "roster", home, "--out", tmp_path / "roster.json")
    for command in (("devices", "add", home, "fr", public["fr"]), ("devices", "list", home), roster):
        assert f"{home}: is no federation's folder (no ca.pem)" in refused(*command)
    assert not home.exists() and not (tmp_path / "roster.json").exists()
    make_authority(home)
    for days, says in (("0", "--days 0: must be more than 0"), ("nan", "--days nan: must be"), ("1e9", "is too long")):
        assert says in refused("devices", "add", home, "fr", public["fr"], "--days", days)
    assert read_devices(home) == []
    said("devices", "add", home, "fr", public["fr"])
    said("devices", "add", home, "de", public["de"], "--days", "2")
    now = datetime.now(UTC)
    assert [one.refused(now) for one in read_devices(home)] == ["", ""]
    assert "'de' expired on" in read_devices(home)[1].refused(now + timedelta(days=2))
    assert "is the key of device 'fr' already" in refused("devices", "add", home, "es", public["fr"])
    assert "is there with another key" in refused("devices", "add", home, "fr", public["es"])
    said("devices", "revoke", home, "fr")
    assert "'fr' was revoked on" in read_devices(home)[0].refused(now)
    said("devices", "add", home, "fr", public["es"])
    assert [one.name for one in read_devices(home) if not one.refused(now)] == ["de", "fr"]
    listed = said("devices", "list", home)
    assert listed.count("let in") == 2 and "was revoked" in " ".join(listed.split())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ3hJXgPMPzQlCDzkvFPUIWKEMl8QpqFtVxfa2Ljqdl1 me",
            "no key on a NIST curve",
        ),
        (b"hello", "is no public key"),
        (b"", "is no public key"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "stays on the device"),
        (b"x" * 10_000, "cannot be read"),
    ],
)
def test_what_is_no_key_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "key.pub").write_bytes(content)
    with pytest.raises(LegolmError, match=says):
        add_device(tmp_path, "fr", tmp_path / "key.pub")
    assert not (tmp_path / "devices.json").exists()


def test_names_and_registers_that_are_none(tmp_path: Path) -> None:
    public = make_key(tmp_path / "fr")
    for name in ("llm", "../fr", "", "a b", "x" * 65):
        with pytest.raises(LegolmError, match="a name has letters"):
            add_device(tmp_path, name, public)
    with pytest.raises(LegolmError, match="is not registered; there are: none"):
        revoke_device(tmp_path, "fr")
    (tmp_path / "devices.json").write_text('{"devices": [{"name": "fr"}]}')
    with pytest.raises(LegolmError, match="is no register of devices"):
        read_devices(tmp_path)
    (tmp_path / "devices.json").unlink()
    add_device(tmp_path, "fr", public)
    register = (tmp_path / "devices.json").read_text()
    for key in ("garbage", "ecdsa-sha2-nistp384 garbage", ""):
        (tmp_path / "devices.json").write_text(register.replace(json.loads(register)["devices"][0]["key"], key))
        with pytest.raises(LegolmError, match=r"is no register of devices .*is no public key"):
            add_device(tmp_path, "de", make_key(tmp_path / f"de{len(key)}"))
    with pytest.raises(LegolmError, match="has no certificate authority"):
        make_server(tmp_path, ["localhost"])
    make_authority(tmp_path)
    with pytest.raises(LegolmError, match="is no host name"):
        make_server(tmp_path, ["http://x"])


def test_what_was_stopped_between_two_files_is_completed(tmp_path: Path) -> None:
    """With the key that is there: it may be the only one."""
    for make, public, secret in ((make_key, "device.pub", "device.key"), (make_authority, "ca.pem", "ca.key")):
        folder = tmp_path / public
        make(folder)
        key, shown = (folder / secret).read_bytes(), (folder / public).read_bytes()
        (folder / public).unlink()
        make(folder)
        assert (folder / secret).read_bytes() == key
        if make is make_key:
            assert (folder / public).read_bytes() == shown
        with pytest.raises(LegolmError, match="already"):
            make(folder)
