"""Which client holds what: rows dealt into parts, one a client, and examples held out of each."""

from __future__ import annotations

import difflib
import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from legolm.config import DataConfig, RunConfig, SiteConfig
from legolm.data.examples import Example
from legolm.data.layouts import Reading, unread, with_system
from legolm.data.sources import Row, check_apart, names_of, parts_of, read_records
from legolm.data.starter import SplitName, is_starter, starter_parts
from legolm.data.store import ClientData, Examples, Store
from legolm.errors import LegolmError, brief
from legolm.system import file_state

Groups = dict[str, np.ndarray]
"""Places in the store by what decides whose they are: file, column value or client; "" where only chance does."""

_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_DRAWS = 100
_SHOWN = 5
_REMEDY = {
    "file": "put more rows in a file named after it",
    "folder": "put more rows in a folder named after it",
    "column": "give more rows with its name in the column",
    "iid": "give more rows",
    "dirichlet": "give more rows or raise split.alpha",
}


def load_parts(
    config: DataConfig, clients: Sequence[str], seed: int, notes: list[str] | None = None
) -> dict[str, ClientData]:
    """The parts that clients ask for by name, in their order; equal for equal seeds.

    The starter data and splits by file or column have parts of their own; IID and Dirichlet splits deal all
    rows to the names given. What there is to say of the rows is added to `notes`. Raises `LegolmError` for bad rows, an
    unknown part, or one with an empty split.
    """
    if is_starter(config.train):
        _refuse_what_starter_ignores(config)
        parts = starter_parts(config.train, seed)
        _check_known(clients, parts)
        return {client: _finish(_with_system(parts[client], config.system), config) for client in clients}
    sources = {split: getattr(config, split) for split in _SPLITS}
    for split in ("validation", "test"):
        if not isinstance(other := sources[split], float):
            check_apart(config.train, other, f"data.{split}")
    store, names, said, unused = Store(), list(dict.fromkeys(clients)), list[str](), Counter[str]()
    groups = {
        split: _group(source, split, config, names, store, said, unused)
        for split, source in sources.items()
        if not isinstance(source, float)
    }
    if config.split.by in ("iid", "dirichlet"):
        groups = _deal(groups, names, config, seed)
    _check_known(clients, groups["train"], [line for line in said if " rows skipped: " in line])
    found = {client: _finish(_hold_out(client, groups, config, seed, store), config) for client in clients}
    if notes is not None:
        nobodys = [line for split, parts in groups.items() for line in _left_out(split, parts, clients)]
        notes += [*said, *nobodys, *unread("data", unused), *_learned(store, list(found.values()))]
    return found


def own_part(
    source: str | Sequence[str], config: DataConfig, part: str, seed: int, field: str, notes: list[str]
) -> ClientData:
    """One client's rows, all of `source`: read and split as `load_parts` does the part of this name.

    What there is to say of the rows is added to `notes`. Raises `LegolmError` for bad rows, and for too few.
    """
    store, places, reading = Store(), array("q"), Reading(config, field, None, config.system is not None)
    for _, example in reading.examples(source):
        places.append(len(store))
        store.add(with_system(example, config.system))
    notes += [*reading.notes, *unread(field, reading.unused)]
    groups: dict[SplitName, Groups] = {"train": {part: np.frombuffer(places, dtype=np.int64)}}
    found = _finish(_hold_out(part, groups, config, seed, store), config)
    notes += _learned(store, [found])
    return found


def data_fingerprint(data: Mapping[str, ClientData], server: Sequence[Example] = ()) -> str:
    """SHA-256 over every client's examples, by client, and the server's own where it has some."""
    found = hashlib.sha256()
    for client, one in sorted(data.items()):
        for split in _SPLITS:
            found.update(f"{client} {split} {len(getattr(one, split))}".encode())
            for example in getattr(one, split):
                found.update(repr(example).encode())
    for example in server:
        found.update(repr(example).encode())
    return found.hexdigest()


def _group(
    source: str | list[str],
    split: SplitName,
    config: DataConfig,
    clients: Sequence[str],
    store: Store,
    said: list[str],
    unused: Counter[str],
) -> Groups:
    field, by = f"data.{split}", config.split.by
    labels = _by_place(source, split, config, clients, said) if by in ("file", "folder") else {}
    groups: dict[str, array[int]] = {}
    column = config.split.column if by in ("column", "dirichlet") else None
    if (
        by == "column"
        and split != "train"
        and not any(isinstance(row, Row) and column in row.values for row in read_records(source, field))
    ):
        said.append(f"{field}: no row has `{column}`, so that all clients share it.")
        column = None
    reading = Reading(config, field, column, config.system is not None)
    for row, example in reading.examples(source):
        label = labels[row.source] if labels else "" if column is None else str(row[column])
        groups.setdefault(label, array("q")).append(len(store))
        store.add(with_system(example, config.system))
    if not groups:
        raise LegolmError(f"{field}: {source!r} has no rows; name files with examples")
    said += reading.notes
    unused += reading.unused
    found = {label: np.frombuffer(places, dtype=np.int64) for label, places in groups.items()}
    return dict.fromkeys(clients, found[""]) if by in ("file", "folder", "column") and "" in found else found


def _left_out(split: SplitName, parts: Groups, clients: Sequence[str]) -> list[str]:
    """What there is to say of parts that no client asks for."""
    left = sorted(parts.keys() - set(clients))
    if not left:
        return []
    rows, shown = sum(len(parts[name]) for name in left), ", ".join(map(repr, left[:_SHOWN]))
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return [f"data.{split}: {rows:,} rows are of no client: {brief(shown)}{more}."]


def _learned(store: Store, parts: Sequence[ClientData]) -> list[str]:
    """What there is to say of rows to test on that equal some to learn from."""
    train, test = (
        store.hashes(np.unique(np.concatenate([one.places for one in some])))
        for some in ([part.train for part in parts], [part.test for part in parts])
    )
    count = int(np.isin(test, train).sum())
    said = (
        f"data: {count:,} of {len(test):,} test rows are training rows, too (of the same client or another): what "
        "was learned is tested; leave rows out that are there twice."
    )
    return [said] if count else []


def _by_place(
    source: str | list[str], split: SplitName, config: DataConfig, clients: Sequence[str], said: list[str]
) -> dict[str, str]:
    """Each file's part: its stem, or the nearest of its folders' names by which all clients find theirs.

    "" for everyone's: validation or test sets in which no client has a part of its own.
    """
    field, first = f"data.{split}", int(config.split.by == "folder")
    parts = parts_of(source, field)
    names = [names_of(part)[first:] or [""] for part in parts]
    depth = min((len(one) for one in names), default=0)
    levels = [[one[level] for one in names] for level in range(depth)]
    # Files of one stem are no two parts of a client; those in one folder are one.
    apart = [level for place, level in enumerate(levels) if first or place or len(set(level)) == len(level)]
    chosen = next((level for level in apart if set(clients) <= set(level)), None)
    if chosen is None and split != "train" and not any(set(clients) & set(level) for level in levels[:2]):
        said.append(f"{field}: no part has a client's name, so that all clients share it.")
        chosen = [""] * len(parts)
    if chosen is not None and chosen is not levels[0] and chosen[0]:
        said.append(f"{field}: parts are called as their folders are.")
    if chosen is None and levels and levels[0] not in apart:
        twice = next(place for place, name in enumerate(levels[0]) if levels[0].index(name) < place)
        raise LegolmError(
            f"{field}: {parts[levels[0].index(levels[0][twice])]} and {parts[twice]} are both part "
            f"{levels[0][twice]!r}; rename one, or name their folders after the clients"
        )
    return dict(zip(map(str, parts), chosen or (levels[0] if levels else []), strict=True))


def _deal(
    groups: Mapping[SplitName, Groups], clients: Sequence[str], config: DataConfig, seed: int
) -> dict[SplitName, Groups]:
    """Each client's share of every label's examples: equal or Dirichlet, and the same in each split.

    Dirichlet shares are drawn anew while a client lacks examples, each time a little more even. After the last draw
    it is left to `_hold_out` to say who lacks what.
    """
    labels = sorted({label for by_label in groups.values() for label in by_label})
    if config.split.by == "iid":
        draws: Iterable[np.ndarray] = [np.full((len(labels), len(clients)), 1 / len(clients))]
    else:
        rng = np.random.default_rng(random.Random(f"{seed} shares").getrandbits(64))
        drawn = (rng.dirichlet([config.split.alpha] * len(clients), size=len(labels)) for _ in range(_DRAWS))
        draws = (shares + (1 / len(clients) - shares) * turn / _DRAWS for turn, shares in enumerate(drawn))
    held_out = len(_SPLITS) - len(groups)
    for shares in draws:
        dealt = {
            split: _cut(by_label, dict(zip(labels, shares, strict=True)), clients, f"{seed} {split}")
            for split, by_label in groups.items()
        }
        least = {split: min(map(len, by_client.values())) for split, by_client in dealt.items()}
        if least.pop("train") > held_out and all(least.values()):
            break
    return dealt


def _cut(by_label: Groups, shares: Mapping[str, np.ndarray], clients: Sequence[str], key: str) -> Groups:
    """Shuffle each label's examples and cut them by its shares: each goes to exactly one client.

    Where they do not come out even, a chance of each label decides: of many labels with a few rows nobody gets more for
    its place among clients.
    """
    dealt: dict[str, list[np.ndarray]] = {client: [] for client in clients}
    for label, places in sorted(by_label.items()):
        shuffled = _shuffled(places, f"{key} {label}")
        chance = random.Random(f"{key} {label} rounding").random()
        ends = np.floor(np.cumsum(shares[label]) * len(places) + chance).astype(int)
        ends[-1] = len(places)
        for client, (start, end) in zip(clients, pairwise([0, *ends]), strict=True):
            dealt[client].append(shuffled[start:end])
    return {client: np.concatenate(found) for client, found in dealt.items()}


def _hold_out(
    client: str, groups: Mapping[SplitName, Groups], config: DataConfig, seed: int, store: Store
) -> ClientData:
    """The client's examples, shuffled; what validation and test hold out leaves the training rows."""
    nothing = np.empty(0, dtype=np.int64)
    own = {
        split: _shuffled(by_client.get(client, nothing), f"{seed} {split} {client}")
        for split, by_client in groups.items()
    }
    rows = len(own["train"])
    for split in _SPLITS[1:]:
        share = getattr(config, split)
        if isinstance(share, float):
            held_out = max(1, round(share * rows))
            own[split], own["train"] = own["train"][:held_out], own["train"][held_out:]
    for split in _SPLITS:
        if not len(own[split]):
            raise LegolmError(
                f"data.{split}: client {client!r} is left without {split} examples "
                f"({rows} rows in data.train, split by {config.split.by}); {_REMEDY[config.split.by]}"
            )
    return ClientData(*(Examples(store, own[split]) for split in _SPLITS))


def _finish(data: ClientData, config: DataConfig) -> ClientData:
    """The limits of the config."""
    limits = (config.limit_train, config.limit_validation, config.limit_test)
    held = (data.train, data.validation, data.test)
    return ClientData(*(examples[:limit] for examples, limit in zip(held, limits, strict=True)))


def _shuffled(places: np.ndarray, key: str) -> np.ndarray:
    return places[random.Random(key).sample(range(len(places)), len(places))]


def _check_known(clients: Sequence[str], parts: Collection[str], skipped: Sequence[str] = ()) -> None:
    """Raise `LegolmError` for a client without a part, which may have been `skipped` row by row."""
    for client in clients:
        if client not in parts:
            (nearest,) = difflib.get_close_matches(client, parts, n=1, cutoff=0)
            fault = f"clients: the data has no part {client!r}; of its {len(parts)} the nearest is {nearest!r}"
            raise LegolmError("; ".join([fault, *skipped]))


def _with_system(data: ClientData, system: str | None) -> ClientData:
    held = (data.train, data.validation, data.test)
    return ClientData(*(Examples.of(with_system(example, system) for example in examples) for examples in held))


def _refuse_what_starter_ignores(config: DataConfig) -> None:
    for name in ("validation", "test", "layout", "fields", "bad_rows", "split"):
        if getattr(config, name) != DataConfig.model_fields[name].default:
            raise LegolmError(f"data.{name}: the starter data has its own; take it out or change data.train")


def client_data(config: RunConfig | SiteConfig, notes: list[str] | None = None) -> dict[str, ClientData]:
    """Every client's data, by client id; what there is to say of the rows is added to `notes`.

    What was read last is not read again while its files stay as they are: a plan asks, and its run.
    """
    parts = {client.id: client.data or client.id for client in config.clients}
    names, files = list(dict.fromkeys(parts.values())), _files(config.data)
    key = None if files is None else repr((config.data.model_dump_json(), names, config.seed, files))
    if key is None or key not in _READ:
        said: list[str] = []
        loaded = load_parts(config.data, names, config.seed, said)
        _READ.clear()
        _READ[key] = loaded, said
    loaded, said = _READ[key]
    if notes is not None:
        notes += said
    return {client: loaded[part] for client, part in parts.items()}


_READ: dict[str | None, tuple[dict[str, ClientData], list[str]]] = {}


def _files(config: DataConfig) -> list[str] | None:
    """The sources and the state of each file; None where that cannot be known."""
    found: list[str] = []
    for split in _SPLITS:
        source = getattr(config, split)
        for part in [] if isinstance(source, float) or is_starter(source) else parts_of(source, f"data.{split}"):
            if not isinstance(part, Path):
                return None
            try:
                found += [str(part), file_state(part)]
            except OSError:  # who reads it says what is wrong
                return None
    return found
