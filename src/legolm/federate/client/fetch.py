"""Where a device's block comes from: what it has, a folder that it was given, or the server, in checked pieces."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from legolm.errors import LegolmError, PublicError
from legolm.federate.bridge import PIECE
from legolm.federate.wire import BlockFile, Welcome
from legolm.models import resolve
from legolm.system import check_room, file_hash

Piece = Callable[[str, int], bytes]
"""(BLOCK/FILE, first byte) -> at most `PIECE` bytes."""
TRIES = 3
"""Of a piece whose hash is not the one that was told."""


class UnreachableError(LegolmError):
    """Nobody answers now; later somebody may."""


def find_block(
    welcome: Welcome, home: Path, folders: Sequence[Path], piece: Piece, note: Callable[[str], None]
) -> Path:
    """The block's folder: in `home`, among `folders`, or fetched into `home`, where it stays.

    What came before a cut is not fetched again, nor a file that another block here has; what changed here since it came
    is. Reads all that a block holds. Raises `LegolmError` for what is not what the server told, and `UnreachableError`
    when the server goes away.
    """
    if not welcome.files:
        raise PublicError(f"block {welcome.block}: the server told no files of it; is it of another version of legolm?")
    path = home / "blocks" / welcome.block_id
    partial = path.with_name(f".{path.name}.partial")
    if path.is_dir():
        added = _added(path, welcome)
        changed = [one.name for one in welcome.files if not _is(path / one.name, one)]
        if not changed and not added:
            return path
        named = ", ".join([*changed, *added])
        note(f"block {welcome.block}: {named} in {path} changed since it came; what differs comes again")
        path.rename(partial)
    for name in _added(partial, welcome):
        (partial / name).unlink()
    for folder in folders:
        if all(_is(folder / one.name, one) for one in welcome.files):
            note(f"block {welcome.block}: is the one in {folder}")
            return folder
    others = [*folders, *sorted(path.parent.glob("[!.]*"))]
    for one in [one for one in welcome.files if not (partial / one.name).exists()]:
        there = next((place for place in others if _is(place / one.name, one)), None)
        if there is not None:
            (partial / one.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(there / one.name, partial / one.name)
    left = welcome.bytes - sum(one.stat().st_size for one in partial.rglob("*") if one.is_file())
    check_room(home, max(left, 0), "--home")
    if left > 0:
        note(f"block {welcome.block}: {left / 1e6:.1f} MB to fetch")
    for one in welcome.files:
        _fetch(partial / one.name, one, f"{welcome.block}/{one.name}", piece)
    partial.rename(path)
    return path


def _added(folder: Path, welcome: Welcome) -> list[str]:
    """Files in a block's folder that the server told nothing of, which who loads the block may read."""
    found = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file() or one.is_symlink()}
    return sorted(found - {one.name for one in welcome.files})


def block_folder(block: str) -> Path:
    """Folder of `--block`: a folder, or a hub id, downloaded unless it is here. Raises `LegolmError` for neither."""
    try:
        return resolve(block)
    except LegolmError as error:
        raise LegolmError(f"--block {block}: {str(error).removeprefix('model: ')}") from None


def _fetch(path: Path, told: BlockFile, name: str, piece: Piece) -> None:
    if len(told.pieces) != -(-told.bytes // PIECE):
        raise PublicError(f"block file {name}: {len(told.pieces)} hashes of pieces for {told.bytes} bytes")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        for index, wanted in enumerate(told.pieces):
            file.seek(index * PIECE)
            size = min(PIECE, told.bytes - index * PIECE)
            if _hash(file.read(size)) == wanted:
                continue
            file.seek(index * PIECE)
            file.write(_checked(name, index, wanted, piece))
            file.flush()
        file.truncate(told.bytes)
    if not _is(path, told):
        shutil.rmtree(path.parent)
        raise PublicError(f"block file {name}: its pieces are right and the whole is not; ask for it again")


def _checked(name: str, index: int, wanted: str, piece: Piece) -> bytes:
    for _ in range(TRIES):
        content = piece(name, index * PIECE)
        if _hash(content) == wanted:
            return content
    raise PublicError(f"block file {name}: piece {index + 1} came {TRIES} times, and never as the server told it")


def _is(path: Path, told: BlockFile) -> bool:
    return path.is_file() and path.stat().st_size == told.bytes and file_hash(path) == told.sha256


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
