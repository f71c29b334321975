"""What belongs to a model beside weights, config and tokenizer, and goes along into whatever is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from legolm.errors import LegolmError
from legolm.models.checkpoint import GENERATION, MAX_CONFIG, read_object
from legolm.system import read_bounded

CARRIED = re.compile(r"(?i)chat_template\.json|.*\.model|(licen[sc]e|copying|notice|usage_policy|use_policy)([._-].*)?")
"""Names of files that are copied as they are: what tokenizers were made of, and under which terms all is given."""
MAX_CARRIED = 64 << 20
"""Bytes of one of them."""


def check_own(file: Path) -> None:
    """Raise `LegolmError` for a link to a file of another name outside of its folder, which would be copied to whoever
    gets a block. The hub's cache links to blobs, and folders of links to files of the same name.
    """
    if not file.is_symlink():
        return
    target, folder = file.resolve(), file.parent.resolve()
    blobs = folder.parent.parent / "blobs"
    if not target.is_relative_to(folder) and target.parent != blobs and target.name != file.name:
        raise LegolmError(f"model: {file}: is a link out of its folder, to {target}; put the file there, or remove it")


def carry(source: Path, folder: Path) -> None:
    """Copy a checkpoint's generation settings, tokenizer model and licence beside the weights of what was made of it.

    Names of code (`auto_map`) stay behind, as the code does. Raises `LegolmError` for a file that cannot be read.
    """
    for file in sorted(source.iterdir()):
        if CARRIED.fullmatch(file.name) and file.is_file():
            check_own(file)
            try:
                (folder / file.name).write_bytes(read_bounded(file, MAX_CARRIED))
            except OSError as error:
                raise LegolmError(f"model: {file}: cannot be copied ({error.strerror}); mend or remove it") from None
    if (source / GENERATION).exists():
        settings = read_object(source / GENERATION, MAX_CONFIG)
        settings.pop("auto_map", None)
        (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
