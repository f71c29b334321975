"""Whole runs on a tiny model, of two dense clients and a narrower one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from legolm import pipeline
from legolm.config import RunConfig
from legolm.runs import Summary


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Two dense clients, one with a narrower MLP (`wide`)."""
    holds = ("dense", "dense", "wide")
    data = {"train": f"{tmp_path}/data/*.jsonl", "limit_test": 1, "limit_validation": 1}
    found = three_clients(tmp_path, holds, rows=10, data=data, evaluate={"local_only": False})
    found["blocks"][1]["intermediate_size"] = 48
    return found


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Summary]:
    """Run a config in a folder of this name; blocks are cut once a test, final models written for who asks."""

    def go(config: RunConfig, name: str = "out", models: bool = False, **options: Any) -> Summary:
        return pipeline.run(config, tmp_path / name, store=tmp_path / "store", models=models, **options)

    return go
