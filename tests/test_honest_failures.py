"""What goes wrong without anybody's ill will, and is named: rates that diverge, weights that are no numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import assert_one_line, legolm
from legolm.errors import LegolmError


@pytest.fixture
def config(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """A run of a dense, a structured and a sparse block; `changes` replace whole sections."""
    raw = three_clients(tmp_path, ("dense", "wide", "sparse"), rows=10, evaluate={"local_only": False})
    raw["data"] |= {"limit_test": 1, "limit_validation": 1}

    def write(**changes: Any) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(raw | changes))
        return path

    return write


@pytest.mark.parametrize(
    ("steps", "rate", "says"),
    [
        (3, "1e30", "fr: train.learning_rate 1e+30: the loss is not finite at step 2 (examples "),
        (1, "1e30", "if training diverged, lower train.learning_rate, 1e+30"),  # its one step's loss was finite
    ],
)
def test_a_rate_that_diverges_is_named_with_client_and_step(
    steps: int, rate: str, says: str, config: Callable[..., Path], tmp_path: Path
) -> None:
    changes = ("--set", f"train.steps={steps}", "--set", f"train.learning_rate={rate}")
    done = legolm("run", config(), "--out", tmp_path / "out", *changes)
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(error) == 1
    assert "round 1: 0 updates accepted" in error[0] and says in error[0]
    assert all(f"{client}: " in error[0] for client in ("fr", "de", "es"))


def test_a_recovery_that_diverges_is_named(config: Callable[..., Path], tmp_path: Path) -> None:
    raw = json.loads(config().read_text())
    raw["blocks"][1]["recover"] = {"steps": 3, "learning_rate": 1e30}
    done = legolm("run", config(blocks=raw["blocks"]), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "error: block wide: recover.learning_rate 1e+30: the loss is not finite at step 2; lower it" in done.stderr


def broken(model: Path, to: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one entry of one tensor at this value."""
    shutil.copytree(model, to)
    file = to / "model.safetensors"
    tensors = load_file(file)
    tensors[name].flatten()[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return to


NAMES = ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight")


@pytest.mark.parametrize(("name", "value"), zip(NAMES, (float("nan"), float("inf"), -float("inf")), strict=True))
def test_a_weight_that_is_no_number_is_named_before_anything_runs(
    name: str, value: float, tiny: Callable[[str], Path], config: Callable[..., Path], tmp_path: Path
) -> None:
    model = broken(tiny("llama"), tmp_path / "model", name, value)
    says = (f"{model / 'model.safetensors'}: tensor {name} is not finite",)
    out = tmp_path / "out"
    run = config(model=str(model))
    assert_one_line(legolm("run", run, "--dry-run", "--out", out), *says)
    assert_one_line(legolm("run", run, "--out", out), *says)
    text = run.parent / "text.txt"
    text.write_text("Some words that say little.\n" * 40)
    cut = ("--intermediate-size", "64", "--calibration", text, "--samples", "2", "--length", "32")
    assert_one_line(legolm("prune", model, "--method", "structured", *cut, "--out", out), *says)
    assert_one_line(legolm("eval", model, "--data", tmp_path / "data" / "fr.jsonl"), *says)
    assert not out.exists()


def test_a_weight_that_becomes_no_number_is_seen(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from legolm.models.load import check_weights

    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    file = model / "model.safetensors"
    check_weights(model)
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-4:] = struct.pack("<f", math.nan)  # where it lies, as long as before and with its time
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(LegolmError, match=r"model.safetensors: tensor .* is not finite"):
        check_weights(model)


def test_a_block_with_a_weight_that_is_no_number_is_named(config: Callable[..., Path], tmp_path: Path) -> None:
    """One that is given, by the dry run; one of the run's own that was changed on the disk is cut again, and said."""
    run = config()
    assert legolm("run", run, "--out", tmp_path / "first", "--set", "federation.rounds=1").returncode == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    block = broken(tmp_path / "first" / "blocks" / "wide", tmp_path / "cut", name, float("nan"))
    says = (f"{block / 'model.safetensors'}: tensor {name} is not finite",)
    blocks = [{"name": "dense", "method": "dense"}, {"name": "wide", "path": str(block)}]
    clients = [{"id": "fr", "block": "dense"}, {"id": "de", "block": "wide"}]
    given = config(blocks=blocks, clients=clients)
    assert_one_line(legolm("run", given, "--dry-run", "--out", tmp_path / "out"), *says)
    nan = block.rename(tmp_path / "nan")
    broken(tmp_path / "first" / "blocks" / "wide", block, name, 3.0)
    says = (f"{block / 'model.safetensors'}: is not what the run wrote (its hash differs)",)
    assert_one_line(legolm("run", given, "--dry-run", "--out", tmp_path / "out"), *says)
    own = tmp_path / "first" / "blocks" / "wide" / "model.safetensors"
    (nan / "model.safetensors").replace(own)
    shutil.rmtree(tmp_path / "first" / "rounds" / "0001")
    (tmp_path / "first" / "summary.json").unlink()
    done = legolm("run", config(), "--out", tmp_path / "first", "--set", "federation.rounds=1", "--resume")
    assert done.returncode == 0, done.stderr
    assert f"note: {own}: is not what the run wrote (its hash differs); {own.parent} is made again" in done.stderr
    assert load_file(own)[name].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_sees_one_bad_entry_anywhere(dtype: torch.dtype) -> None:
    from legolm.models import finite

    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert finite(tensor) and finite(tensor[:0]) and finite(torch.ones(3, dtype=torch.int64))
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in range(tensor.numel()):
            bad = tensor.clone()
            bad.view(-1)[place] = value
            assert not finite(bad)
