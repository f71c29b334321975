"""Losses on logits that are never stored: the head is the dearest matrix of a small model, its output the largest.

The logits of a chunk of positions are made, turned into loss and gradient, and forgotten (Wijmans et al., "Cut your
losses in large-vocabulary language models", arXiv 2411.09009, do it in one kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax, softmax

from legolm.config import Precision
from legolm.models.precision import dtype_of

CHUNK = 128
"""Positions whose logits exist at once."""

Rule = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits (chunk, vocabulary) float32, which positions) -> (loss of each, its gradient by the logits)."""


@dataclass(frozen=True)
class Head:
    """From hidden states to logits, as the model does it: weight (vocabulary, hidden) in the products' dtype."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @staticmethod
    def of(model: Any, precision: Precision) -> Head:
        """The head of a model; a copy where its dtype is another."""
        module, config, dtype = model.get_output_embeddings(), model.config, dtype_of(precision)
        scale = getattr(config, "logit_scale", None) or 1.0
        return Head(
            weight=module.weight.detach().to(dtype),
            bias=None if module.bias is None else module.bias.detach().to(dtype),
            scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(positions, vocabulary) float32 from (positions, hidden)."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, logits: Tensor, grad: Tensor) -> Tensor:
        """Gradient by the hidden states, from that by the logits (overwritten)."""
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        if self.scale != 1.0:
            grad *= self.scale
        return grad.to(self.weight.dtype) @ self.weight


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


class _Chunked(torch.autograd.Function):
    """Loss of each position; its gradient is made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, rule: Rule) -> Tensor:  # type: ignore[override]
        losses = torch.empty(len(hidden), device=hidden.device)
        grads = torch.empty_like(hidden)
        for part in _chunks(len(hidden)):
            logits = head.logits(hidden[part])
            losses[part], grad = rule(logits, part)
            if ctx.needs_input_grad[0]:
                grads[part] = head.backward(logits, grad)
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grads,) = ctx.saved_tensors
        return grads * grad[:, None], None, None


def answer_losses(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Cross-entropy (nats) of each position: hidden (n, hidden), labels (n,)."""

    def rule(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        wanted = labels[part, None]
        p = softmax(logits, -1)
        # log Σ exp from the likeliest token, whose probability cannot vanish: one pass of exp serves both.
        top, likeliest = logits.max(-1, keepdim=True)
        total = top - p.gather(1, likeliest).log()
        losses = (total - logits.gather(1, wanted))[:, 0]
        p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
        return losses, p

    losses: Tensor = _Chunked.apply(hidden, head, rule)  # type: ignore[no-untyped-call]
    return losses


def judged(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats, float32) and whether the label is the likeliest token, each (n,); arguments as above."""
    losses, right = torch.empty(len(hidden), device=hidden.device), torch.empty_like(labels, dtype=torch.bool)
    for part in _chunks(len(hidden)):
        logits = head.logits(hidden[part])
        losses[part] = cross_entropy(logits, labels[part], reduction="none")
        right[part] = logits.argmax(-1) == labels[part]
    return losses, right


def divergences(hidden: Tensor, head: Head, teacher: Tensor, teacher_head: Head) -> Tensor:
    """KL(teacher ‖ student) (nats) of each position, from hidden states (n, hidden) of both."""

    def rule(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_p = log_softmax(teacher_head.logits(teacher[part]), -1)
        p = log_p.exp()
        log_q = log_softmax(logits, -1)
        loss = (p * (log_p - log_q)).sum(-1)
        return loss, log_q.exp_().sub_(p)

    losses: Tensor = _Chunked.apply(hidden, head, rule)  # type: ignore[no-untyped-call]
    return losses
