"""Rows from files or hub data sets. Each knows its place, so that every error says which line of which file to mend."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from legolm.data.files import READERS, BadRow, first_line, kind_of, records, stem_of
from legolm.errors import LegolmError, MissingDataError, brief
from legolm.system import file_state, hub_answers, unreadable, wants_offline


@dataclass(frozen=True)
class Row:
    """One record: its values, its file or hub data set, and its place as errors cite it."""

    values: dict[str, Any]
    source: str
    place: str

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            there = brief(", ".join(map(str, self.values)))
            raise BadRow(self.place, f"no field `{name}`; there are: {there}")
        return self.values[name]


def read_rows(source: str | Sequence[str], field: str) -> Iterator[Row]:
    """Rows of a path, a glob, `hub:owner/name[[:config]:split]` or a list of them; `field` names it in errors.

    Raises `LegolmError` for what cannot be read, and for what is named twice.
    """
    for row in read_records(source, field):
        if isinstance(row, BadRow):
            raise row
        yield row


def read_records(source: str | Sequence[str], field: str) -> Iterator[Row | BadRow]:
    """As `read_rows`; what is wrong with one row only comes in its place."""
    for part in parts_of(source, field):
        empty = True
        for place, values in records(part, field) if isinstance(part, Path) else _read_hub(part, field):
            empty = False
            if isinstance(values, dict):
                yield Row(values, str(part), place)
            elif isinstance(values, BadRow):
                yield values
            else:
                yield BadRow(place, f"a row must be an object, not {type(values).__name__}")
        if empty:
            raise LegolmError(f"{field}: {part} is empty")


def is_rows(source: str) -> bool:
    """Whether this names rows, by its ending; else it is plain text."""
    return source.startswith("hub:") or kind_of(Path(source)) in READERS


def parts_of(source: str | Sequence[str], field: str) -> list[Path | str]:
    """The files and hub data sets of a source. Raises `LegolmError` for one that is there twice."""
    found: dict[str, Path | str] = {}
    for item in [source] if isinstance(source, str) else source:
        for part in [item] if item.startswith("hub:") else paths_of(item, field):
            if _same(part) in found:
                raise LegolmError(
                    f"{field}: {part} is named twice, so that its rows could be in two splits; name it once"
                )
            found[_same(part)] = part
    return list(found.values())


def names_of(part: Path | str) -> list[str]:
    """What tells it from others, the nearest first: a file's stem and its folders, a hub data set's name and config."""
    if isinstance(part, Path):
        return [stem_of(part), *(folder.name for folder in part.absolute().parents)]
    name, config, _ = hub_parts(part)
    return [name.rstrip("/").rpartition("/")[2], *([config] if config else [])]


def hub_parts(source: str) -> tuple[str, str | None, str]:
    """Name (or folder), config and split of `hub:NAME[[:CONFIG]:SPLIT]`; a split may be sliced, `train[:10%]`."""
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix("hub:"))
    if len(rest) > 2:
        raise LegolmError(f"{source!r}: has more than hub:owner/name:config:split")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def check_apart(
    train: str | Sequence[str],
    other: str | Sequence[str],
    field: str,
    why: str = "what was learned would be tested",
) -> None:
    """Raise `LegolmError`, with what would come of it, where training data and another field's share a source."""
    trained = {_whole(part) for part in parts_of(train, "data.train")}
    for part in parts_of(other, field):
        if _whole(part) in trained:
            share = ", or a share such as 0.1 to hold out" if field.startswith("data.") else ""
            raise LegolmError(f"{field}: {part} is also in data.train, so that {why}; take other rows{share}")


def _same(part: Path | str) -> str:
    """What all names of one file have in common, and all of one split of a hub data set."""
    if isinstance(part, Path):
        try:
            found = part.stat()
            return f"{found.st_dev} {found.st_ino}"  # hard links are one file, too
        except (OSError, ValueError):  # none there, a NUL in it; who opens it says so
            return str(part)
    return repr(hub_parts(part))


def state_of(part: Path | str) -> str | None:
    """Of a file `file_state`; none of a hub data set, nor of what cannot be read."""
    if isinstance(part, Path):
        with suppress(OSError, ValueError):
            return file_state(part)
    return None


def _whole(part: Path | str) -> str:
    """As `_same`, and a slice of a hub's split, like `train[:10%]`, is that split."""
    return _same(part) if isinstance(part, Path) else _same(part).partition("[")[0].rstrip("')")


def paths_of(pattern: str, field: str) -> list[Path]:
    """The file of this name, or all that match the pattern. Raises `LegolmError` when none does."""
    try:
        path = Path(pattern).expanduser()
        if path.exists() or not any(sign in pattern for sign in "*?["):
            return [path]
        root = Path(path.anchor)
        found = sorted(match for match in root.glob(str(path.relative_to(root))) if match.is_file())
    except PermissionError as error:
        raise unreadable(f"{field}: {pattern}", error) from None
    except (ValueError, RuntimeError, OSError) as error:  # a pattern like a**b, the home of nobody, a name too long
        raise LegolmError(f"{field}: {pattern!r} is no path or pattern ({first_line(error)})") from None
    if not found:
        raise MissingDataError(f"{field}: {pattern!r} matches no file")
    return found


def _read_hub(source: str, field: str) -> Iterator[tuple[str, Any]]:
    name, config, split = hub_parts(source)
    try:
        from datasets import load_dataset
    except ImportError:
        raise LegolmError(f"{field}: {source!r} needs datasets; run: pip install 'legolm[data]'") from None
    if not Path(name).is_dir() and not wants_offline() and not hub_answers():
        raise LegolmError(
            f"{field}: {source!r} cannot be loaded, the hub does not answer; set HF_HUB_OFFLINE=1 to use what was "
            "downloaded before, or give a file"
        )
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds: not downloaded before, not found, gated
        if known := re.search(r"available configs: \[(.*?)\]", str(error)):
            configs = known[1].replace("'", "").split(", ")
            example = f"{split}:train" if split in configs else f"{configs[0]}:{split}"
            raise LegolmError(
                f"{field}: {source!r}: the data set has several configs ({brief(', '.join(configs))}); name one, as in "
                f"hub:{name}:{example}"
            ) from None
        raise LegolmError(f"{field}: {source!r} cannot be loaded ({first_line(error)}); give a file") from None
    for number, row in enumerate(rows, 1):
        yield f"{source} row {number}", dict(row)
