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
from legolm.plan import make_plan

UNIT = 2 * (64 + 64) * 4
"""Bytes of one direction of q_proj: two layers, A (1, 64) and B (64, 1), float32."""


@pytest.mark.parametrize(
    ("aggregate", "directions"),
    [
        # Three dense clients of rank 4 in two rounds: the start's, and both rounds'.
        ({"scheme": "fedavg"}, 3 * 4),
        ({"scheme": "fedavg", "server_optimizer": "fedadam"}, 4 + 2 * (4 + 8)),
        # And the clients' stacked products each round.
        ({"scheme": "flexlora"}, 3 * 4 + 2 * 12),
        ({"form": "exact", "residual_rank": 9}, 3 * 4 + 2 * 9),
        # Folds pile up: 12 after the first round, 24 after the second; each client came to have the first.
        ({"scheme": "flora"}, 3 * 4 + 12 + 24 + 3 * 12),
    ],
)
def test_stages_by_hand_and_on_the_disk(
    aggregate: dict[str, Any], directions: int, three_clients: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate={"local_only": False})
    raw["data"] |= {"limit_test": 1, "limit_validation": 1}
    raw["lora"]["targets"] = ["q_proj"]
    config = configs.validate(RunConfig, raw | {"aggregate": aggregate}, "test")
    plan = make_plan(config)
    blocks = sum(block.file_bytes for block in plan.blocks)
    assert plan.disk_bytes - plan.models_bytes - blocks == directions * UNIT
    out = tmp_path / "out"
    pipeline.run(config, out, models=False)
    files = [*out.glob("rounds/*/adapter.safetensors"), *out.glob("clients/*/*.safetensors")]
    there = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert 0.5 * directions * UNIT < there <= directions * UNIT + 100  # and FLoRA's ranks
