"""Sums over calibration text: second moments of what a linear layer reads, and what it should answer."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from legolm.models import autocast

Needs = Literal["nothing", "diagonal", "full"]
STRIP = 256
LARGEST = 1e24
"""Mean square of an input that a message or a file may say: sums of many stay far from float32's end."""


class Moments:
    """Second moments of a linear layer's input: sums over tokens of x² (`diagonal`) or x xᵀ (`full`), float32.

    Sums add up: those of several clients are those of their pooled data.
    """

    def __init__(self, features: int, needs: Needs, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(features if needs == "diagonal" else (features, features), device=device)

    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (..., features)."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(x)
        if self._sum.dim() == 1:
            self._sum += x.square().sum(0)
            return
        # The layers may run in bfloat16; these sums may not: H would not even be positive definite.
        # x xᵀ is symmetric: strips from the diagonal down are little more than half of the work.
        with autocast("fp32", x.device.type):
            for start in range(0, x.shape[1], STRIP):
                strip = slice(start, start + STRIP)
                self._sum[start:, strip].addmm_(x[:, start:].T, x[:, strip])

    def absorb(self, other: Moments) -> None:
        """Add another's sums."""
        self.tokens += other.tokens
        self._sum += other._sum.to(self._sum.device)

    def on(self, device: torch.device) -> Moments:
        """These sums on a device; themselves where they are there."""
        if self._sum.device == device:
            return self
        moved = copy.copy(self)
        moved._sum = self._sum.to(device)
        return moved

    def packed(self) -> Tensor:
        """The sums in one dimension: of x xᵀ the lower triangle, row by row."""
        return self._sum.clone() if self._sum.dim() == 1 else self._sum[_lower(len(self._sum))]

    @staticmethod
    def unpacked(sums: Tensor, tokens: int, features: int, needs: Needs) -> Moments:
        """What `packed` gave. Raises `ValueError` when it does not fit, or is no sum of squares."""
        found = Moments(features, needs)
        count = features if needs == "diagonal" else features * (features + 1) // 2
        if sums.shape != (count,) or sums.dtype != torch.float32 or not bool(sums.isfinite().all()) or tokens < 1:
            raise ValueError(f"sums of shape {tuple(sums.shape)} for {features} features, {tokens} tokens")
        found.tokens = tokens
        if needs == "diagonal":
            found._sum.copy_(sums)
        else:
            found._sum[_lower(features)] = sums
        if bool((found.mean_square < 0).any()):
            raise ValueError(f"a sum of squares is {float(found.mean_square.min()):g}")
        if bool((found.mean_square > LARGEST).any()):
            raise ValueError(f"a mean square is {float(found.mean_square.max()):g}, over {LARGEST:g}")
        return found

    @staticmethod
    def of(sums: Tensor, tokens: int) -> Moments:
        """With these sums of x xᵀ (features, features), float32, over so many tokens."""
        found = Moments(len(sums), "full", sums.device)
        found.tokens, found._sum = tokens, sums
        return found

    @property
    def sum(self) -> Tensor:
        """Σ x² (features,) or Σ x xᵀ (features, features)."""
        return self._sum if self._sum.dim() == 1 else self._sum.tril() + self._sum.tril(-1).T

    @property
    def mean_square(self) -> Tensor:
        """E[x²] of each feature."""
        return (self._sum if self._sum.dim() == 1 else self._sum.diagonal()) / max(self.tokens, 1)


class Regression:
    """Sums to fit a linear layer by: x xᵀ of its inputs (in, in), y xᵀ of what it should give (out, in); float32."""

    def __init__(self, linear: nn.Linear) -> None:
        self.moments = Moments(linear.in_features, "full", linear.weight.device)
        self.cross = torch.zeros(linear.out_features, linear.in_features, device=linear.weight.device)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs (..., in) and wanted outputs (..., out)."""
        self.moments.add(inputs)
        with autocast("fp32", inputs.device.type):
            self.cross.addmm_(outputs.flatten(0, -2).float().T, inputs.flatten(0, -2).float())


class Answers:
    """Sums of how the matrix that ends attention or MLP should answer: as it does, or for the layer to err less.

    Its bias stays. Where an RMS norm follows (Gemma 3, OLMo 2), errors count as they arrive in the residual
    stream: each token by the size that the norm divides by, and corrected through the norm's gain. Where a part
    only of the answer is `added` (Granite), the answer makes up for as much more.
    """

    def __init__(self, linear: nn.Linear, norm: nn.Module, added: float) -> None:
        self.sums = Regression(linear)
        self._bias, self._norm, self._added = linear.bias, norm, added
        self._gain = norm(torch.ones(linear.out_features, device=linear.weight.device))
        # A small gain would blow an error up, and the norm share it out over all channels: those take a part only.
        self._through = self._gain / self._gain.square().clamp(min=self._gain.square().mean())

    def add(self, inputs: Tensor, answer: Tensor, error: Tensor | None) -> None:
        """Add inputs (..., in), answers (..., out), and what the layer's output lacks, of as many entries."""
        answer = answer.float()
        size = (answer * self._gain).norm(dim=-1, keepdim=True) / self._norm(answer).norm(dim=-1, keepdim=True)
        size = size.nan_to_num(1.0)  # a token that answers nothing
        if self._bias is not None:
            answer = answer - self._bias
        wanted = answer / size
        if error is not None:
            wanted = wanted + error.view_as(answer) / self._added * self._through
        self.sums.add(inputs / size, wanted)


def _lower(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()
