"""A certificate authority of one's own, the server's certificate, and a device's key; all on the curve P-384.

Flower takes server certificates in PEM and devices' keys in OpenSSH's format.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shlex import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from legolm.errors import LegolmError, brief
from legolm.system import atomic_write, check_room

CA, CA_KEY = "ca.pem", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
KEY, PUBLIC = "device.key", "device.pub"
AUTHORITY_DAYS, SERVER_DAYS = 3650, 825
"""The second is as long as browsers and Apple's systems take a certificate for."""
Public = ec.EllipticCurvePublicKey
MAX_HOST = 253
HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
"""Labels with dots between them, the first of which may stand for any."""
EARLIER = timedelta(hours=1)
"""Certificates are valid from this long before they are made: clocks differ."""


def make_authority(folder: Path) -> None:
    """`ca.pem` and `ca.key`. Raises `LegolmError` where there is an authority: what it signed would be nothing."""
    if (folder / CA).exists():
        raise LegolmError(f"{folder}: has a certificate authority already ({CA}); give another folder")
    if not (folder / CA_KEY).exists():
        write_secret(folder / CA_KEY, _pem(ec.generate_private_key(ec.SECP384R1())))
    key, name = _signing(folder), _name(f"legolm federation {folder.resolve().name}")
    certificate = (
        _certificate(key.public_key(), name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    atomic_write(folder / CA, certificate.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM))


def check_federation(folder: Path, field: str = "") -> None:
    """Raise `LegolmError` where the folder, given as `field`, is no federation's: nobody asks its register."""
    if not (folder / CA).is_file():
        raise LegolmError(f"{field} {folder}: is no federation's folder (no {CA}); run: legolm certs init".lstrip())


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise `LegolmError` for what is no host name or address, before anything is made for it."""
    for host in hosts:
        _host(host)


def make_server(folder: Path, hosts: Sequence[str]) -> None:
    """`server.pem` and `server.key` for these names and addresses, by the authority in `folder`; anew if there.

    Raises `LegolmError` where there is no authority, and as `check_hosts`.
    """
    authority, signing = _authority(folder)
    named = [_host(host) for host in hosts]
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _certificate(key.public_key(), _name(hosts[0]), authority.subject, signing.public_key(), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(named), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    write_secret(folder / SERVER_KEY, _pem(key))
    atomic_write(folder / SERVER_CERTIFICATE, certificate.sign(signing, hashes.SHA384()).public_bytes(Encoding.PEM))


def server_files(folder: Path) -> tuple[Path, Path, Path]:
    """The CA, the server's certificate and its key. Raises `LegolmError` when one is missing, or not valid now."""
    found = folder / CA, folder / SERVER_CERTIFICATE, folder / SERVER_KEY
    for path in found:
        if not path.is_file():
            raise LegolmError(f"federation.superlink.home: no {path}; run: legolm certs init {quote(str(folder))}")
    certificate = _read_certificate(found[1])
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        raise LegolmError(
            f"{found[1]}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}; look at this machine's clock, or run: "
            f"legolm certs server {quote(str(folder))}"
        )
    return found


def make_key(folder: Path) -> Path:
    """A device's `device.key`, which stays where it is made, and `device.pub`, which it gives. The latter's path.

    `device.pub` has two public keys, a line each: by the first a device is let in, with the second it signs what it
    sends to secure sums (`identity_key`).
    """
    if (folder / PUBLIC).exists():
        raise LegolmError(f"{folder}: has a key already ({KEY}); remove it to make another, or give another folder")
    if not (folder / KEY).exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write_secret(folder / KEY, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = _device_key(folder).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    identity = Ed25519PrivateKey.from_private_bytes(identity_key(folder)).public_key()
    second = identity.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    atomic_write(folder / PUBLIC, public + b"\n" + second + b"\n")
    return folder / PUBLIC


def identity_key(folder: Path) -> bytes:
    """The secret Ed25519 key (32 bytes) of the device in `folder`, derived from its `device.key`.

    Raises `LegolmError` where that is none.
    """
    number = _device_key(folder).private_numbers().private_value
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"legolm identity").derive(
        number.to_bytes(66, "big")
    )


def _device_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key((folder / KEY).read_bytes(), None)
    except (OSError, ValueError) as error:
        raise LegolmError(
            f"{folder / KEY}: is no private key ({brief(error)}); make one: legolm certs client"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LegolmError(f"{folder / KEY}: is no key on a NIST curve; make one: legolm certs client")
    return key


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if not (folder / CA_KEY).is_file():
        raise LegolmError(
            f"{folder}: has no certificate authority ({CA_KEY}); run: legolm certs init {quote(str(folder))}"
        )
    return _read_certificate(folder / CA), _signing(folder)


def _signing(folder: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_key((folder / CA_KEY).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise LegolmError(f"{folder / CA_KEY}: is no private key ({brief(error)}); restore it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LegolmError(f"{folder / CA_KEY}: is no key on an elliptic curve; restore it")
    return key


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LegolmError(f"{path}: is no certificate ({brief(error)}); restore it") from None


def _certificate(
    public: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    issuer: x509.Name,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > MAX_HOST or not HOST.fullmatch(host):
        raise LegolmError(f"--host {host!r}: is no host name or address; for instance fl.example.org or 10.0.0.5")
    return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_secret(path: Path, content: bytes) -> None:
    """Readable by its owner only, from the first moment on."""
    check_room(path.parent, field="folder")
    atomic_write(path, content, 0o600)
