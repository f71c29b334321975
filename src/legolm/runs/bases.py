"""Where an adapter's block is found: PEFT's config names it by one path, taken from the folder that one works in.

A path into the run would end with the run's next move. So the blocks of final adapters have a second name outside of
it, in the user's cache: hard links, which are the same files, take no room and stay when the run moves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

from legolm.runs.folder import RunDir
from legolm.runs.repair import HASHES, reseal
from legolm.system import atomic_write, cache_folder, read_json

BASE = "base_model_name_or_path"


def lasting_base(block: Path) -> Path:
    """The block's second name; its own where the cache is on another disk, or cannot be written.

    Second names of blocks whose runs were deleted go when another one comes.
    """
    own = block.resolve()
    try:
        home = cache_folder() / "bases"
    except RuntimeError:  # nobody's home
        return own
    files = [file for file in sorted(own.iterdir()) if file.is_file()]
    same = "".join(f"{file.name} {(stat := file.stat()).st_dev} {stat.st_ino}\n" for file in files)
    folder = home / hashlib.sha256(same.encode()).hexdigest()[:32]
    partial = home / f".{uuid.uuid4().hex}.partial"
    try:
        if not folder.is_dir():
            _forget(home)
            partial.mkdir(parents=True)
            for file in files:
                os.link(file, partial / file.name)
            partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        return folder if folder.is_dir() else own  # another process was faster
    return folder


def point_adapters(run: RunDir) -> list[Path]:
    """Let each final adapter name its block's lasting path, which is another after a move to another disk.

    The folders of those that did not.
    """
    found = []
    for file in sorted(run.finals.glob("*/**/adapter/adapter_config.json")):
        final, config = run.finals / file.relative_to(run.finals).parts[0], read_json(file, BASE)
        block = run.block(str(read_json(final / "manifest.json", "name")["name"]))
        # The LLM's is no block of the run: it stays where it is when the run moves.
        if not block.is_dir() or config[BASE] == (base := str(lasting_base(block))):
            continue
        atomic_write(file, json.dumps(config | {BASE: base}, indent=2))
        if (final / HASHES).is_file():
            reseal(final, file)
        found.append(file.parent)
    return found


def _forget(home: Path) -> None:
    """Take away what no run has any more: each of its files has one name only."""
    for folder in home.glob("*"):
        files = list(folder.iterdir())
        if files and all(file.stat().st_nlink == 1 for file in files):
            shutil.rmtree(folder, ignore_errors=True)
