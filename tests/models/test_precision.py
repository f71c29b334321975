"""How `auto` is decided, and that a resumed run keeps the decision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from legolm.config import RunConfig
from legolm.models import choose_device, choose_precision, dtype_of, precision
from legolm.runs import RunDir


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(2.0, 1.0, "bf16"), (1.0, 2.0, "fp32")])
def test_auto_takes_what_is_faster(fp32: float, bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(precision, "_seconds", lambda dtype, device: times[dtype])
    assert choose_precision("auto") == chosen
    assert choose_precision("fp32") == "fp32"
    assert dtype_of("bf16") is torch.bfloat16


def test_auto_measures_here() -> None:
    assert choose_precision("auto") in ("fp32", "bf16")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


def test_a_resumed_run_keeps_its_precision(tmp_path: Path) -> None:
    config = RunConfig(blocks=[{"name": "a", "method": "dense"}], clients=[{"id": "c", "block": "a"}], precision="auto")
    assert RunDir(tmp_path / "run").settled(config).precision == "auto"
    other = "fp32" if choose_precision("auto") == "bf16" else "bf16"
    RunDir.open(tmp_path / "run", config.model_copy(update={"precision": other}), resume=False)
    assert RunDir(tmp_path / "run").settled(config).precision == other
