"""Files that appear whole or not at all, and room for them."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from legolm.errors import LegolmError, brief

LOCK = ".lock"


class DiskFullError(LegolmError):
    """No room now; later there may be."""


os.umask(_UMASK := os.umask(0))  # it can only be read by setting it


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, made if need be, for this process alone.

    Raises `LegolmError` when another one holds it, or waits for it; and when it cannot be made or written to,
    `DiskFullError` on a full disk.

    The lock goes with the process, however that ends.
    """
    with writing(folder / LOCK):
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            raise LegolmError(
                f"{folder}: another process ({holder}) works in this folder; wait for its end, or give another folder"
            ) from None
        try:
            with writing(folder / LOCK):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
        except LegolmError:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        yield
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well and vanishes when it does not.

    Raises `LegolmError` for a `path` that holds something, which stays, and `DiskFullError` when the disk is full.
    """
    _check_free(path)
    with scratch_folder(path) as partial:
        yield partial
        _settle(partial)
        _check_free(path)  # what others may have put there meanwhile
        partial.rename(path)
        _sync(path.parent)


def _check_free(path: Path) -> None:
    """Raise `LegolmError` unless a folder that is renamed to `path` replaces nothing but an empty one."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or next(path.iterdir(), None) is not None):
        raise LegolmError(f"{path}: is already there; move it away, or give another place")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to make a file or a folder that becomes `path`, which is not there, when the block ends well.

    It vanishes when the block does not. Raises `DiskFullError` when the disk is full.
    """
    with scratch_folder(path) as partial:
        made = partial / path.name
        yield made
        _settle(made)
        made.rename(path)
        _sync(path.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that vanishes when the block ends.

    Raises `LegolmError` when it cannot be made and when the disk is full.
    """
    _sweep(path)
    folder, holder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial", None
    try:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            if disk_full(error):
                raise
            raise LegolmError(f"{path}: cannot be made there ({brief(error)}); give another place") from None
        holder = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # file systems without locks
            fcntl.flock(holder, fcntl.LOCK_EX)
        yield folder
    except Exception as error:
        if disk_full(error):
            raise DiskFullError(f"{path}: the disk is full; free some space and run the command again") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if holder is not None:
            os.close(holder)


def _sweep(path: Path) -> None:
    """Take away what killed processes left of this folder. Whoever works on theirs holds it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if left.is_dir() and not left.is_symlink():
            try:
                descriptor = os.open(left, os.O_RDONLY)
            except OSError:  # another user's, in a folder that all share; gone since
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            else:
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def atomic_write(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write a file whole or not at all, from its first moment on with no more than the permissions of `mode`.

    Raises `LegolmError` when it cannot be written, `DiskFullError` on a full disk.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            _sync(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):  # its folder cannot be made
            partial.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `LegolmError` where the block cannot write the file `path`, `DiskFullError` on a full disk."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise DiskFullError(f"{path}: the disk is full; free some space and run the command again") from None
        what = "there is a folder" if path.is_dir() else error.strerror or brief(error)
        raise LegolmError(
            f"{path}: cannot be written ({what}); move away what is there, or give another place"
        ) from None


def link(source: str | Path, target: str | Path) -> None:
    """A second name for the same file, or a copy where the file system has none."""
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def cache_folder() -> Path:
    """legolm's in the user's cache; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "legolm"


def held_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; a file with several names, as a comparison's blocks have, is there once."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def check_room(out: Path, needed: int = 0, field: str = "--out") -> None:
    """Raise `LegolmError` when `out` cannot be made or its disk has less than `needed` bytes: before hours of work.

    `field` is what names it.
    """
    try:
        folder = out.resolve()
        while not folder.exists():
            folder = folder.parent
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, links in a ring
        raise LegolmError(f"{out}: cannot be made ({brief(error)}); give another {field}") from None
    if not folder.is_dir():
        raise LegolmError(f"{out}: {folder} is a file; give another {field}")
    try:  # what the permissions say is not all: /proc, a read-only disk, one on which a file may be made but not filled
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"1")
    except OSError as error:
        if disk_full(error):
            raise DiskFullError(f"{out}: the disk is full; free some space or give another {field}") from None
        raise LegolmError(f"{out}: {folder} cannot be written to ({error.strerror}); give another {field}") from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{out}: needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; "
            f"free some space or give another {field}"
        )


def check_new(out: Path, needed: int = 0, field: str = "--out") -> None:
    """Raise `LegolmError` when `out` is there, or as `check_room` does: before the work, not after it."""
    if os.path.lexists(out):  # of a name too long `check_room` tells
        raise LegolmError(f"{field} {out}: is already there; give another one")
    check_room(out, needed, field)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise `LegolmError` where the block cannot read what `what` names: a field and a file."""
    try:
        yield
    except OSError as error:
        raise unreadable(what, error) from None


def unreadable(what: str, error: OSError) -> LegolmError:
    """What to raise for a file, named by `what` with its field, that the system does not let us read."""
    why = error.strerror or brief(error)
    return LegolmError(f"{what}: cannot be read ({why}); check its permissions and its disk")


def read_bounded(path: Path, most: int = 1 << 28) -> bytes:
    """The whole file. Raises `OSError` for one that is missing, larger than `most` bytes, or a device or pipe, which
    may never end.
    """
    if path.exists() and not path.is_dir() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    with path.open("rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise OSError(errno.EFBIG, f"has more than the {most} bytes that are read", str(path))
    return found


def read_json(path: Path, *fields: str) -> dict[str, Any]:
    """A JSON object from a file of the run. Raises `LegolmError` when it is broken or lacks one of the fields."""
    try:
        value = json.loads(read_bounded(path))
    except (OSError, ValueError) as error:
        raise LegolmError(f"{path}: cannot be read ({error}); start the run again in a new folder") from None
    if not isinstance(value, dict):
        raise LegolmError(f"{path}: must hold a JSON object; start the run again in a new folder")
    if missing := [field for field in fields if field not in value]:
        raise LegolmError(f"{path}: no `{missing[0]}`, another version wrote it; start the run again in a new folder")
    return value


def disk_full(error: BaseException) -> bool:
    """Whether it says that there is no room: the system, a library in its own words, or `DiskFullError`."""
    # safetensors reports a full disk as its own error, with the system's words in it.
    return (
        isinstance(error, DiskFullError)
        or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(error)
        or "os error 28" in str(error)
    )


def _settle(made: Path) -> None:
    """All files on the disk, and as the user's others: safetensors makes its own readable by nobody else.

    One with a second name elsewhere is not this folder's alone, and stays as it is.
    """
    for file in [made, *made.rglob("*")]:
        if file.is_file():
            if file.stat().st_nlink == 1:
                file.chmod(0o666 & ~_UMASK)
            _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
