"""Identities for secure sums: made with a device's key, registered with it, and given to all."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import assert_one_line, legolm
from legolm.errors import LegolmError
from legolm.privacy import identity_of
from legolm.trust import (
    add_device,
    identity_key,
    make_authority,
    make_key,
    read_devices,
    read_roster,
    revoke_device,
)


def test_a_device_signs_with_what_was_registered(tmp_path: Path) -> None:
    make_authority(tmp_path / "home")
    for name in ("fr", "de"):
        add_device(tmp_path / "home", name, make_key(tmp_path / name))
    out = tmp_path / "roster.json"
    assert "the identities of 2 devices" in legolm("devices", "roster", tmp_path / "home", "--out", out).stdout
    roster = read_roster(out)
    assert roster == {name: identity_of(identity_key(tmp_path / name)).hex() for name in ("fr", "de")}
    assert roster["fr"] != roster["de"]
    revoke_device(tmp_path / "home", "fr")
    legolm("devices", "roster", tmp_path / "home", "--out", out)
    assert list(read_roster(out)) == ["de"]


def test_a_key_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    public = make_key(tmp_path / "fr")
    public.write_text(public.read_text().splitlines()[0] + "\n")
    add_device(tmp_path / "home", "fr", public)
    assert [one.identity for one in read_devices(tmp_path / "home")] == [None]


@pytest.mark.parametrize("text", ["", "[]", '{"fr": "12"}', '{"../fr": "' + "0" * 64 + '"}'])
def test_what_is_no_roster(tmp_path: Path, text: str) -> None:
    (tmp_path / "roster.json").write_text(text)
    with pytest.raises(LegolmError, match="is no roster of identities"):
        read_roster(tmp_path / "roster.json")
    (tmp_path / "fr.jsonl").write_text('{"instruction": "Say", "output": "a"}\n')
    given = ("--server", "h:1", "--home", tmp_path / "fr", "--data", tmp_path / "fr.jsonl")
    done = legolm("client", *given, "--roster", tmp_path / "roster.json")
    assert_one_line(done, f"{tmp_path}/roster.json: is no roster of identities", "legolm devices roster")


def test_a_second_key_of_another_kind(tmp_path: Path) -> None:
    public = make_key(tmp_path / "fr")
    public.write_text(2 * (public.read_text().splitlines()[0] + "\n"))
    with pytest.raises(LegolmError, match="its second key is none of Ed25519"):
        add_device(tmp_path / "home", "fr", public)
