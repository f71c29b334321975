"""The schemes once more: dense, float64, one matrix at a time, written from the formulas and for clarity alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from legolm.adapter import Tensors, parse_key
from legolm.block import Coverage
from legolm.models import Shape


@dataclass
class Client:
    """Started from `received`, ended with `received + delta`, both in its block's slice; counts `n`."""

    coverage: Coverage
    rank: int
    n: int
    received: Tensors
    delta: Tensors

    def ended(self, key: str) -> Tensor:
        return self.received[key].double() + self.delta[key].double()


def placed(shape: Shape, coverage: Coverage, key: str, rank: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """(the slice in the LLM's coordinates with zeros elsewhere, 1 where the block holds the entry)."""
    layer, module, side = parse_key(key)
    rows, cols = shape.matrix(module)
    full = torch.zeros(rank, cols, dtype=torch.float64) if side == "A" else torch.zeros(rows, rank).double()
    held = torch.zeros_like(full)
    own = range(full.shape[1 if side == "A" else 0])
    index = coverage.cols(layer, module) if side == "A" else coverage.rows(layer, module)
    where = list(own) if index is None else index.tolist()
    for i, j in enumerate(where):
        if side == "A":
            full[: value.shape[0], j], held[: value.shape[0], j] = value[:, i].double(), 1.0
        else:
            full[j, : value.shape[1]], held[j, : value.shape[1]] = value[i].double(), 1.0
    return full, held


def factor_form(
    shape: Shape, theta: Tensors, rank: int, clients: list[Client], denominator: str, eta: float
) -> Tensors:
    """θ + η Σ n c ∘ Δ / D."""
    result = {}
    for key, old in theta.items():
        numerator, weight = torch.zeros_like(old).double(), torch.zeros_like(old).double()
        for client in clients:
            if key in client.delta:
                change, held = placed(shape, client.coverage, key, rank, client.delta[key])
                numerator += client.n * change
                weight += client.n * held
        d = weight if denominator == "coverage_mean" else torch.full_like(weight, sum(c.n for c in clients))
        result[key] = old.double() + torch.where(weight > 0, eta * numerator / d, 0.0)
    return result


def exact_form(
    shape: Shape, product: Tensors, clients: list[Client], denominator: str, eta: float, rank: int
) -> Tensors:
    """S + η Σ n C ∘ (B_k A_k − P_B P_A) / D for every module, not truncated."""
    result = {}
    for name, old in product.items():
        layer, module, _ = parse_key(f"{name}.A")
        numerator, weight = torch.zeros_like(old), torch.zeros_like(old)
        for client in clients:
            if f"{name}.A" not in client.delta:
                continue
            a, _ = placed(shape, client.coverage, f"{name}.A", rank, client.ended(f"{name}.A"))
            b, _ = placed(shape, client.coverage, f"{name}.B", rank, client.ended(f"{name}.B"))
            pa, held_a = placed(shape, client.coverage, f"{name}.A", rank, client.received[f"{name}.A"])
            pb, held_b = placed(shape, client.coverage, f"{name}.B", rank, client.received[f"{name}.B"])
            held = held_b[:, :1] @ held_a[:1]
            mask = client.coverage.mask(layer, module)
            if mask is not None:
                held = held * mask.double()
            numerator += client.n * held * (b @ a - pb @ pa)
            weight += client.n * held
        d = weight if denominator == "coverage_mean" else torch.full_like(weight, sum(c.n for c in clients))
        result[name] = old + torch.where(weight > 0, eta * numerator / d, 0.0)
    return result


def mean_product(clients: list[Client], name: str) -> Tensor:
    """Σ n_k B_k A_k / Σ n_k of dense clients."""
    total = sum(client.n for client in clients)
    return sum(c.n / total * c.ended(f"{name}.B") @ c.ended(f"{name}.A") for c in clients)  # type: ignore[return-value]


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]
