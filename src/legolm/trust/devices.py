"""The register of devices: a device is who holds a registered key, whatever it says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator

from legolm.config import Name
from legolm.errors import LegolmError, brief
from legolm.system import atomic_write, locked, read_bounded

REGISTER = "devices.json"
MAX_KEY = 4096


class Device(BaseModel):
    """One device: its name, which is its client's id in the config, and its public key in OpenSSH's format.

    `identity` is its Ed25519 public key for secure sums, hexadecimal; keys made by earlier versions have none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Name
    key: str
    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    added: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    @field_validator("key")
    @classmethod
    def _is_key(cls, key: str) -> str:
        try:
            pem_of(key)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(f"is no public key: {error}") from None
        return key

    def refused(self, now: datetime) -> str:
        """Why it is kept out now; empty where it is not."""
        if self.revoked is not None:
            return f"the key of device {self.name!r} was revoked on {self.revoked:%Y-%m-%d}"
        if self.expires is not None and now >= self.expires:
            return f"the key of device {self.name!r} expired on {self.expires:%Y-%m-%d}"
        return ""


class _Register(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    devices: list[Device]


def read_devices(folder: Path) -> list[Device]:
    """All that were ever added, the revoked ones too. Raises `LegolmError` for a register that is not one."""
    try:
        return _Register.model_validate_json(read_bounded(folder / REGISTER)).devices
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        raise LegolmError(f"{folder / REGISTER}: is no register of devices ({brief(error)}); restore it") from None


def add_device(folder: Path, name: str, key: Path, days: float | None = None) -> Device:
    """Register the public key in the file `key` under `name`, for so many days if given.

    Raises `LegolmError` for what is no public key of a NIST curve, and for a name or key that is there already; a
    revoked device's name may have a new key.
    """
    if days is not None and not days > 0:
        raise LegolmError(f"--days {days:g}: must be more than 0; leave it out for a key that does not expire")
    with locked(folder):
        (line, identity), devices, now = _public(key), read_devices(folder), datetime.now(UTC)
        for one in devices:
            if pem_of(one.key) == pem_of(line):
                raise LegolmError(f"{key}: is the key of device {one.name!r} already; make another one")
            if one.name == name and not one.refused(now):
                raise LegolmError(f"device {name!r}: is there with another key; revoke it first, or give another name")
        try:
            expires = None if days is None else now + timedelta(days=days)
            found = Device(name=name, key=line, identity=identity, added=now, expires=expires)
        except ValidationError:
            raise LegolmError(
                f"device {name!r}: a name has letters, digits, '.', '_' and '-', at most 64, and is not `llm`"
            ) from None
        except OverflowError:
            raise LegolmError(f"--days {days:g}: is too long") from None
        _write(folder, [*devices, found])
    return found


def revoke_device(folder: Path, name: str) -> Device:
    """Keep the device out from now on. Raises `LegolmError` where none has this name."""
    with locked(folder):
        devices = read_devices(folder)
        at = next((at for at in reversed(range(len(devices))) if devices[at].name == name), None)
        if at is None:
            known = ", ".join(dict.fromkeys(one.name for one in devices)) or "none"
            raise LegolmError(f"device {name!r}: is not registered; there are: {known}")
        devices[at] = devices[at].model_copy(update={"revoked": devices[at].revoked or datetime.now(UTC)})
        _write(folder, devices)
    return devices[at]


def pem_of(line: str) -> bytes:
    """The public key in an OpenSSH line as PEM, as Flower sends it."""
    return load_ssh_public_key(line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class _Roster(RootModel[dict[Name, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]]):
    """Ed25519 public keys by device, hexadecimal."""


def roster(folder: Path) -> dict[str, str]:
    """The identities of all registered devices that are let in and have one: Ed25519 public keys, hexadecimal."""
    now = datetime.now(UTC)
    return {one.name: one.identity for one in read_devices(folder) if one.identity and not one.refused(now)}


def write_roster(folder: Path, path: Path) -> None:
    """The roster of the federation in `folder` as a file to give to its devices."""
    atomic_write(path, _Roster(roster(folder)).model_dump_json(indent=1) + "\n")


def read_roster(path: Path) -> dict[str, str]:
    """What `write_roster` wrote. Raises `LegolmError` for what is no roster."""
    try:
        return _Roster.model_validate_json(read_bounded(path)).root
    except (OSError, ValidationError) as error:
        raise LegolmError(
            f"{path}: is no roster of identities ({brief(error)}); on the server: legolm devices roster"
        ) from None


def _public(path: Path) -> tuple[str, str | None]:
    """The device's key, and its identity if the file has a second line."""
    try:
        content = read_bounded(path, MAX_KEY)
    except OSError as error:
        raise LegolmError(f"{path}: cannot be read ({brief(error)}); give the device's device.pub") from None
    first, _, second = content.strip().partition(b"\n")
    try:
        key = load_ssh_public_key(first)
        identity = load_ssh_public_key(second.strip()) if second.strip() else None
    except (ValueError, UnsupportedAlgorithm) as error:
        private = " It is the private key, which stays on the device." if b"PRIVATE KEY" in content else ""
        raise LegolmError(
            f"{path}: is no public key ({brief(error)}); give the device's device.pub.{private}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise LegolmError(f"{path}: is no key on a NIST curve, which Flower wants; make one: legolm certs client")
    if identity is not None and not isinstance(identity, Ed25519PublicKey):
        raise LegolmError(f"{path}: its second key is none of Ed25519; make one: legolm certs client")
    public = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return public, identity.public_bytes_raw().hex() if identity else None


def _write(folder: Path, devices: Sequence[Device]) -> None:
    atomic_write(folder / REGISTER, _Register(devices=list(devices)).model_dump_json(indent=1) + "\n")
