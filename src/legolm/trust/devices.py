"""The register of devices: a device is who holds a registered key, whatever it says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from legolm.config import Name
from legolm.errors import LegolmError, brief
from legolm.system import atomic_write, locked, read_bounded

REGISTER = "devices.json"
MAX_KEY = 4096


class Device(BaseModel):
    """One device: its name, which is its client's id in the config, and its public key in OpenSSH's format."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Name
    key: str
    added: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

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
    with locked(folder):
        devices, line, now = read_devices(folder), _public(key), datetime.now(UTC)
        for one in devices:
            if pem_of(one.key) == pem_of(line):
                raise LegolmError(f"{key}: is the key of device {one.name!r} already; make another one")
            if one.name == name and not one.refused(now):
                raise LegolmError(f"device {name!r}: is there with another key; revoke it first, or give another name")
        try:
            found = Device(name=name, key=line, added=now, expires=now + timedelta(days=days) if days else None)
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


def _public(path: Path) -> str:
    try:
        content = read_bounded(path, MAX_KEY)
    except OSError as error:
        raise LegolmError(f"{path}: cannot be read ({brief(error)}); give the device's device.pub") from None
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        private = " It is the private key, which stays on the device." if b"PRIVATE KEY" in content else ""
        raise LegolmError(
            f"{path}: is no public key ({brief(error)}); give the device's device.pub.{private}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise LegolmError(f"{path}: is no key on a NIST curve, which Flower wants; make one: legolm certs client")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _write(folder: Path, devices: Sequence[Device]) -> None:
    atomic_write(folder / REGISTER, _Register(devices=list(devices)).model_dump_json(indent=1) + "\n")
