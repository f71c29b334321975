"""The config of a comparison: one run, and how each variant differs from it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from legolm.config.file import assign, named_first, override_all, read, validate
from legolm.config.run import RunConfig
from legolm.config.section import LARGEST, Name, Section
from legolm.errors import LegolmError

RESERVED = ("blocks", "rates", "seeds", "compare.json", "compare.csv", "compare.html")


class Variant(Section):
    """One scheme or setting: overrides as for `--set`, and perhaps one block for all clients.

    `match_bytes` gives each client the rank at which it sends about as many bytes as in the run itself, with its block
    and the scheme there: a client of a small block becomes a dense client of a low rank. Of `rates`, learning rates,
    the one with the least loss on validation data is taken, of runs with the first seed: the same number for every
    variant is a fair search.
    """

    name: Name
    set: dict[str, Any] = Field({})
    block: str | None = Field(None, description="every client's block; `dense`, the whole LLM, is always there")
    match_bytes: bool = False
    rates: list[Annotated[float, Field(gt=0, le=LARGEST[1], allow_inf_nan=False)]] | None = Field(
        None, min_length=2, description="learning rates to choose from, instead of train.learning_rate"
    )

    @model_validator(mode="after")
    def _fits(self) -> Variant:
        if self.name in RESERVED:
            raise ValueError(f"name {self.name!r} is the comparison's own file; take another")
        if self.match_bytes and self.block is None:
            raise ValueError(f"{self.name}: match_bytes is for a variant with `block`")
        names = [f"{rate:g}" for rate in self.rates or ()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{self.name}: rates has {twice[0]} twice; they must differ (in six digits)")
        return self


class Study(Section):
    """`run` is a whole run config, or the path of one beside this file."""

    run: dict[str, Any] | str
    variants: list[Variant] = Field(min_length=1)


def load_study(path: Path, changes: Sequence[str] = ()) -> tuple[Study, dict[str, RunConfig]]:
    """The study and each variant's resolved config, by name; `changes` are `--set` of the run. Raises `LegolmError`.

    A variant trains alone only if that is its mode, or if it or a change sets evaluate.local_only: a table needs that
    once, whatever the run says.
    """
    study, raw = _read(path)
    configs: dict[str, RunConfig] = {}
    for variant in study.variants:
        source = f"config {path}: variant {variant.name}"
        if variant.name in configs:
            raise LegolmError(f"config {path}: variants: {variant.name!r} is there twice; names must differ")
        changed = copy.deepcopy(raw)
        # The run's own stand for none that is asked for here, whether as a field or with its whole section.
        _section(changed, "evaluate").pop("local_only", None)
        if variant.rates:
            _section(changed, "train").pop("learning_rate", None)
        override_all(changed, changes)
        if variant.rates and "learning_rate" in _section(changed, "train"):
            raise LegolmError(f"--set train.learning_rate: variant {variant.name} chooses of its `rates`; take one out")
        for key, value in sorted(variant.set.items(), key=lambda one: named_first(one[0])):
            assign(changed, key, copy.deepcopy(value), f"{source}: set {key!r}")
        if variant.rates and "learning_rate" in _section(changed, "train"):
            raise LegolmError(f"{source}: give `rates` or train.learning_rate in `set`, not both")
        changed.setdefault("evaluate", {})
        _section(changed, "evaluate").setdefault("local_only", _section(changed, "federation").get("mode") == "alone")
        configs[variant.name] = validate(RunConfig, changed, source)
    return study, configs


def load_base(path: Path, changes: Sequence[str] = ()) -> RunConfig:
    """The run itself that a study's variants vary. Raises `LegolmError`."""
    _, raw = _read(path)
    override_all(raw, changes)
    return validate(RunConfig, raw, f"config {path}: run")


def _read(path: Path) -> tuple[Study, dict[str, Any]]:
    study = validate(Study, read(path), f"config {path}")
    return study, read(path.parent / study.run) if isinstance(study.run, str) else study.run


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A section's own mapping; an empty one where it has none."""
    found = raw.get(name)
    return found if isinstance(found, dict) else {}
