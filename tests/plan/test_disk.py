"""What a run keeps on the disk, by hand and beside what is there in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.models import load_config, shape_of
from legolm.plan import make_plan
from legolm.plan.disk import sums_memory

UNIT = 2 * (64 + 64) * 4
"""Bytes of one direction of q_proj: two layers, A (1, 64) and B (64, 1), float32."""


@pytest.mark.parametrize(
    ("aggregate", "directions", "alone"),
    [
        # Three dense clients of rank 4 in two rounds: the start's, and both rounds'.
        ({"scheme": "fedavg"}, 3 * 4, False),
        ({"scheme": "fedavg", "server_optimizer": "fedadam"}, 4 + 2 * (4 + 8), False),
        # And the clients' stacked products each round.
        ({"scheme": "flexlora"}, 3 * 4 + 2 * 12, False),
        ({"form": "exact", "residual_rank": 9}, 3 * 4 + 2 * 9, False),
        # Folds pile up: 12 after the first round, 24 after the second; each client came to have the first.
        ({"scheme": "flora"}, 3 * 4 + 12 + 24 + 3 * 12, False),
        # What each learns alone, and a mixture with it: of both ranks, or of one where frozen factors are the same.
        ({"scheme": "fedavg"}, 3 * 4 + 3 * 4 + 3 * 8, True),
        ({"form": "frozen_side"}, 3 * 4 + 3 * 4 + 3 * 4, True),
    ],
)
def test_stages_by_hand_and_on_the_disk(
    aggregate: dict[str, Any],
    directions: int,
    alone: bool,
    three_clients: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    ends = {"personal": "mixture" if alone else "last"}
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate={"local_only": alone})
    raw["federation"] |= ends
    raw["data"] |= {"limit_test": 1, "limit_validation": 1}
    raw["lora"]["targets"] = ["q_proj"]
    config = configs.validate(RunConfig, raw | {"aggregate": aggregate}, "test")
    plan = make_plan(config)
    blocks = sum(block.file_bytes for block in plan.blocks)
    assert plan.disk_bytes - plan.models_bytes - blocks == directions * UNIT
    out = tmp_path / "out"
    pipeline.run(config, out, models=False)
    files = [*out.glob("rounds/*/adapter.safetensors"), *out.glob("clients/*/*.safetensors")]
    files += [*out.glob("local/*/adapter.safetensors"), *out.glob("personal/*/adapter.safetensors")]
    there = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert 0.5 * directions * UNIT < there <= directions * UNIT + 100  # and FLoRA's ranks


def test_who_takes_no_part_in_rounds_adds_nothing(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = three_clients(tmp_path, ("wide", "wide", "dense"), rows=10, evaluate={"local_only": False})
    raw["federation"] |= {"capable": True}
    raw["lora"]["targets"] = ["q_proj"]
    plan = make_plan(configs.validate(RunConfig, raw | {"aggregate": {"scheme": "flora"}}, "test"))
    blocks = sum(block.file_bytes for block in plan.blocks)
    # One client of rank 4: the start's and both rounds' factors, folds of 4 and 8, and the first fold at this client.
    assert plan.disk_bytes - plan.models_bytes - blocks == (3 * 4 + 4 + 8 + 4) * UNIT
    assert [client.bytes_down for client in plan.clients] == [0, 0, 4 * UNIT]


def test_a_blocks_file_has_its_bit_mask(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = three_clients(tmp_path, ("dense", "sparse", "dense"), rows=10)
    dense, sparse = make_plan(configs.validate(RunConfig, raw, "test")).blocks
    assert sparse.file_bytes - dense.file_bytes == shape_of(load_config(Path(raw["model"]))).layer_weights * 2 // 8


@pytest.mark.parametrize(
    ("cut", "protect", "squares"),
    [
        ({"method": "wanda", "sparsity": 0.5}, False, 2 * 4 * 2 * (3 * 64 + 96)),
        ({"method": "sparsegpt", "sparsity": 0.5}, False, 2 * 4 * 2 * (3 * 64 * 65 + 96 * 97)),
        ({"method": "sparsegpt", "sparsity": 0.5}, True, 3 * 4 * 2 * (3 * 64 * 65 + 96 * 97)),
    ],
)
def test_sums_of_all_layers_are_in_the_memory(
    cut: dict[str, Any],
    protect: bool,
    squares: int,
    three_clients: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Two layers, whose linear layers read 64, 64, 64 and 96 numbers; at the server what is added up and what comes."""
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10)
    asked = {"statistics": "clients", "samples": 4, "length": 32}
    raw["blocks"] = [{"name": "dense", "method": "dense"}, {"name": "cut", **cut, "calibration": asked}]
    if protect:
        raw["federation"] |= {"protect": {"text": "pydoc", "samples": 4, "length": 32}}
    config = configs.validate(RunConfig, raw, "test")
    assert sums_memory(config, shape_of(load_config(Path(raw["model"])))) == squares
