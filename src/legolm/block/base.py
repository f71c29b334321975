"""The LLM on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from legolm.models import Shape, count_parameters, shape_of


@dataclass(frozen=True)
class Base:
    """The LLM on disk: what targets are counted in and blocks are cut from. `parameters` counts what is stored."""

    path: Path
    fingerprint: str
    config: Any
    shape: Shape
    parameters: int
    dtype: torch.dtype

    @staticmethod
    def of(path: Path, fingerprint: str, config: Any) -> Base:
        """The checkpoint in a folder. Raises `LegolmError` when its family is not known."""
        return Base(path, fingerprint, config, shape_of(config), count_parameters(path), config.dtype)

    def parameters_of(self, kept_weights: int) -> int:
        """Stored parameters of a block that keeps so many of the decoder's linear weights."""
        return self.parameters - (decoder_weights(self.shape) - kept_weights)


def decoder_weights(shape: Shape) -> int:
    """Linear weights in all decoder layers."""
    return shape.layers * shape.layer_weights
