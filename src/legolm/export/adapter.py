"""A PEFT adapter of the block as it was cut."""

from __future__ import annotations

from pathlib import Path

import torch

from legolm.adapter import merged, save_adapter
from legolm.errors import LegolmError
from legolm.export.probe import Reference
from legolm.export.source import Source
from legolm.export.target import exporter
from legolm.models import load_model
from legolm.runs import lasting_base

READ, ASKED = 32, 16
LIMIT = 1e-3
"""Of the difference of log-probabilities, over their own size: both are float32."""


def check_unmasked(source: Source) -> None:
    """Raise `LegolmError` for a model that learned nothing, and for an unstructured block: its adapter counts under the
    mask, which no runtime applies.
    """
    if source.factors and source.coverage.masks:
        raise LegolmError(
            f"{source.name}: has bit masks, and its adapter works under them only; hf, gguf, onnx and sparse can hold "
            "it, merged"
        )


@exporter("adapter", check=check_unmasked)
def adapter(source: Source, out: Path) -> list[str]:
    """A folder for `PeftModel.from_pretrained`."""
    from peft import PeftModel

    recorded = source.block.details.get("model")
    factors, bare = source.factors, source.bare
    hub = isinstance(recorded, str) and not source.is_cut and recorded != "starter" and not Path(recorded).exists()
    save_adapter(source.coverage, factors, 1.0, str(recorded) if hub else str(lasting_base(bare)), out)
    wanted = merged_reference(source, READ, ASKED)
    model = PeftModel.from_pretrained(load_model(bare), out)
    found = Reference.of(model, source.tokenizer, READ, ASKED)
    error = float(
        (found.logits - wanted.logits).norm() / wanted.logits.var(-1).sum().mul(wanted.logits.shape[-1]).sqrt()
    )
    if not error <= LIMIT:
        raise LegolmError(
            f"{source.name}: PEFT computes another function (error {error:.2g}, at most {LIMIT:g} is taken): nothing "
            "was exported"
        )
    return [f"for the block {bare}", f"PEFT computes what merging does, error {error:.2g}"]


def merged_reference(source: Source, read: int, asked: int) -> Reference:
    """What the block computes with the adapter merged in float32."""
    model = load_model(source.bare)
    with merged(model, source.coverage, source.factors, 1.0) as whole, torch.no_grad():
        return Reference.of(whole, source.tokenizer, read, asked)
