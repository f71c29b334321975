"""The config of a comparison: one run, and how each variant differs from it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from legolm.config.file import override, read, validate
from legolm.config.run import RunConfig
from legolm.config.section import Name, Section
from legolm.errors import LegolmError

RESERVED = ("blocks", "seeds", "compare.json", "compare.csv", "compare.html")


class Variant(Section):
    """One scheme or setting: overrides as for `--set`, and perhaps one block for all clients.

    `match_bytes` gives each client the rank at which its new block's adapter has the bytes of its old one's: a client
    of a small block becomes a dense client of a low rank.
    """

    name: Name
    set: dict[str, Any] = Field({})
    block: str | None = Field(None, description="every client's block; `dense`, the whole LLM, is always there")
    match_bytes: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Variant:
        if self.name in RESERVED:
            raise ValueError(f"name {self.name!r} is the comparison's own file; take another")
        if self.match_bytes and self.block is None:
            raise ValueError(f"{self.name}: match_bytes is for a variant with `block`")
        return self


class Study(Section):
    """`run` is a whole run config, or the path of one beside this file."""

    run: dict[str, Any] | str
    variants: list[Variant] = Field(min_length=1)


def load_study(path: Path, changes: Sequence[str] = ()) -> tuple[Study, dict[str, RunConfig]]:
    """The study and each variant's resolved config, by name; `changes` are `--set` of the run. Raises `LegolmError`.

    A variant trains alone only if that is its mode, or if it sets evaluate.local_only: a table needs that once.
    """
    study = validate(Study, read(path), f"config {path}")
    raw = read(path.parent / study.run) if isinstance(study.run, str) else study.run
    for change in changes:
        override(raw, change)
    configs: dict[str, RunConfig] = {}
    for variant in study.variants:
        if variant.name in configs:
            raise LegolmError(f"config {path}: variants: {variant.name!r} is there twice; names must differ")
        changed = copy.deepcopy(raw)
        for key, value in variant.set.items():
            override(changed, f"{key}={json.dumps(value, default=str)}")
        federation = changed.get("federation")
        alone = isinstance(federation, dict) and federation.get("mode") == "alone"
        if "evaluate.local_only" not in variant.set:
            override(changed, f"evaluate.local_only={json.dumps(alone)}")
        configs[variant.name] = validate(RunConfig, changed, f"config {path}: variant {variant.name}")
    return study, configs
