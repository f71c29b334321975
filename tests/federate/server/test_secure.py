"""Rounds of secure sums: whole runs on a tiny model, against the same without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.runs import RoundRecord, read_stage


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Three different blocks, and all count the same."""
    evaluate = {"local_only": False}
    found = three_clients(tmp_path, ("dense", "wide", "half"), rows=10, evaluate=evaluate)
    found["aggregate"] = {"weight": "equal"}
    return found


def load(raw: dict[str, Any], **privacy: Any) -> RunConfig:
    return configs.validate(RunConfig, raw | ({"privacy": {"secure": privacy}} if privacy else {}), "test")


def test_three_blocks_end_as_without_where_all_three_hold(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["federation"]["rounds"] = 1
    for name, config in (("plain", load(raw)), ("secure", load(raw, withheld_limit=1))):
        pipeline.run(config, tmp_path / name, store=tmp_path / "store", models=False)
    states = {name: load_file(tmp_path / name / "rounds/0001/adapter.safetensors") for name in ("plain", "secure")}
    before = load_file(tmp_path / "plain/rounds/0000/adapter.safetensors")
    moved = 0
    for key, tensor in states["secure"].items():
        opened = tensor != before[key]
        moved += int(opened.sum())
        assert torch.allclose(tensor[opened], states["plain"][key][opened], atol=4e-6), key
    assert moved > 1000
    record = read_stage(tmp_path / "secure/rounds/0001")
    assert isinstance(record, RoundRecord)
    assert record.accepted == ["fr", "de", "es"]
    assert record.train == {}  # what a client says of its training is not told
    assert record.closed == pytest.approx(0.7)  # the block of one layer, with one of two KV groups
    assert not (tmp_path / "secure" / ".secrets").exists()
