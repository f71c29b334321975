"""Which client holds what: rows dealt into parts, one a client, and examples held out of each."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from legolm.config import DataConfig, Fields, RunConfig, SiteConfig
from legolm.data.examples import ClientData, Example
from legolm.data.sources import Row, check_apart, read_rows, to_example, with_system
from legolm.data.starter import SplitName, is_starter, starter_parts
from legolm.errors import LegolmError

Groups = dict[str, list[Example]]
"""Examples by what decides whose they are: file stem, column value or client; "" where only chance does."""

_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_DRAWS = 100
_REMEDY = {
    "file": "put more rows in a file named after it",
    "column": "give more rows with its name in the column",
    "iid": "give more rows",
    "dirichlet": "give more rows or raise split.alpha",
}


def load_parts(config: DataConfig, clients: Sequence[str], seed: int) -> dict[str, ClientData]:
    """The parts that clients ask for by name, in their order; equal for equal seeds.

    The starter data and splits by file or column have parts of their own; IID and Dirichlet splits deal all
    rows to the names given. Raises `LegolmError` for a bad row, an unknown part, or one with an empty split.
    """
    if is_starter(config.train):
        _refuse_what_starter_ignores(config)
        parts = starter_parts(config.train, seed)
        _check_known(clients, parts)
        return {client: _finish(parts[client], config) for client in clients}
    sources = {split: getattr(config, split) for split in _SPLITS}
    for split in ("validation", "test"):
        if not isinstance(other := sources[split], float):
            check_apart(config.train, other, f"data.{split}")
    groups = {s: _group(source, s, config) for s, source in sources.items() if not isinstance(source, float)}
    if config.split.by in ("iid", "dirichlet"):
        groups = _deal(groups, list(dict.fromkeys(clients)), config, seed)
    _check_known(clients, groups["train"])
    return {client: _finish(_hold_out(client, groups, config, seed), config) for client in clients}


def own_part(
    source: str | Sequence[str], fields: Fields, held_out: tuple[float, float], part: str, seed: int, field: str
) -> ClientData:
    """One client's rows, all of `source`: split as `load_parts` splits the part of this name.

    `held_out` are the shares of validation and test. Raises `LegolmError` for a bad row, and for too few.
    """
    rows = [to_example(row, fields) for row in read_rows(source, field)]
    config = DataConfig(train=field, validation=held_out[0], test=held_out[1])
    return _hold_out(part, {"train": {part: rows}}, config, seed)


def data_fingerprint(data: Mapping[str, ClientData], server: Sequence[Example] = ()) -> str:
    """SHA-256 over every client's examples, by client, and the server's own where it has some."""
    found = hashlib.sha256(b"[")  # of the list's `repr`, which whole would be as large as the data again
    for index, item in enumerate(sorted(data.items())):
        found.update(f"{', ' if index else ''}{item!r}".encode())
    found.update(b"]" + (repr(list(server)).encode() if server else b""))
    return found.hexdigest()


def _group(source: str | list[str], split: SplitName, config: DataConfig) -> Groups:
    groups: Groups = {}
    files: dict[str, str] = {}
    for row in read_rows(source, f"data.{split}"):
        label = _label(row, config)
        # Merging two files of one stem would show one client's rows to another.
        if config.split.by == "file" and files.setdefault(label, row.source) != row.source:
            raise LegolmError(f"data.{split}: {files[label]} and {row.source} are both part {label!r}; rename one")
        groups.setdefault(label, []).append(to_example(row, config.fields))
    if not groups:
        raise LegolmError(f"data.{split}: {source!r} has no rows; name files with examples")
    return groups


def _label(row: Row, config: DataConfig) -> str:
    if config.split.by == "file":
        return row.stem
    return "" if config.split.by == "iid" else str(row[str(config.split.column)])


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
    """Shuffle each label's examples and cut them by its shares: each goes to exactly one client."""
    dealt: Groups = {client: [] for client in clients}
    for label, examples in sorted(by_label.items()):
        shuffled = _shuffled(examples, f"{key} {label}")
        ends = np.rint(np.cumsum(shares[label]) * len(examples)).astype(int)
        ends[-1] = len(examples)
        for client, (start, end) in zip(clients, pairwise([0, *ends]), strict=True):
            dealt[client] += shuffled[start:end]
    return dealt


def _hold_out(client: str, groups: Mapping[SplitName, Groups], config: DataConfig, seed: int) -> ClientData:
    """The client's examples, shuffled; what validation and test hold out leaves the training rows."""
    own = {
        split: _shuffled(by_client.get(client, []), f"{seed} {split} {client}") for split, by_client in groups.items()
    }
    rows = len(own["train"])
    for split in _SPLITS[1:]:
        share = getattr(config, split)
        if isinstance(share, float):
            held_out = max(1, round(share * rows))
            own[split], own["train"] = own["train"][:held_out], own["train"][held_out:]
    for split in _SPLITS:
        if not own[split]:
            raise LegolmError(
                f"data.{split}: client {client!r} is left without {split} examples "
                f"({rows} rows in data.train, split by {config.split.by}); {_REMEDY[config.split.by]}"
            )
    return ClientData(*(tuple(own[split]) for split in _SPLITS))


def _finish(data: ClientData, config: DataConfig) -> ClientData:
    """The limits and the system message of the config."""
    limits = (config.limit_train, config.limit_validation, config.limit_test)
    return ClientData(
        *(
            tuple(with_system(example, config.system) for example in examples[:limit])
            for examples, limit in zip((data.train, data.validation, data.test), limits, strict=True)
        )
    )


def _shuffled(examples: Sequence[Example], key: str) -> list[Example]:
    return random.Random(key).sample(examples, len(examples))


def _check_known(clients: Sequence[str], parts: Collection[str]) -> None:
    for client in clients:
        if client not in parts:
            (nearest,) = difflib.get_close_matches(client, parts, n=1, cutoff=0)
            raise LegolmError(
                f"clients: the data has no part {client!r}; of its {len(parts)} the nearest is {nearest!r}"
            )


def _refuse_what_starter_ignores(config: DataConfig) -> None:
    for name in ("validation", "test", "fields", "split"):
        if getattr(config, name) != DataConfig.model_fields[name].default:
            raise LegolmError(f"data.{name}: the starter data has its own; take it out or change data.train")


def client_data(config: RunConfig | SiteConfig) -> dict[str, ClientData]:
    """Every client's data, by client id."""
    parts = {client.id: client.data or client.id for client in config.clients}
    loaded = load_parts(config.data, list(dict.fromkeys(parts.values())), config.seed)
    return {client: loaded[part] for client, part in parts.items()}
