"""Make a model's forward pass lean for training: packed attention, norms that hand on what the products need.

The model's own code runs; single modules get another forward for as long as the context lasts. What is not recognized
keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from legolm.config import Precision
from legolm.models.family import decoder_layers
from legolm.models.norm import RmsNorm
from legolm.models.packing import Pack, use_packed_attention
from legolm.models.precision import dtype_of

_GAINS: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor | None]] = WeakKeyDictionary()
"""Each norm's weight and gain: a model is made lean for each set of rows."""


@contextmanager
def lean(model: Any, precision: Precision, checkpointing: bool = False) -> Iterator[None]:
    """For `hidden_states`: with `checkpointing` each layer is recomputed in backward, at a third more work."""
    dtype = dtype_of(precision)
    decoder = model.get_decoder()
    patched: list[nn.Module] = []
    hooks = []
    attention = model.config._attn_implementation
    try:
        for name, module in decoder.named_modules():
            if type(module).__name__.endswith("RMSNorm") and (gain := _gain(module)) is not None:
                # The last norm feeds the head, which takes what it needs.
                module.forward = _Norm(gain, _eps(module), dtype if "." in name else torch.float32)
                patched.append(module)
            elif type(module).__name__.endswith("RotaryEmbedding"):
                hooks.append(
                    module.register_forward_hook(lambda _module, _inputs, out: tuple(t.to(dtype) for t in out))
                )
        if checkpointing:
            for layer in decoder_layers(model):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
                patched.append(layer)
        use_packed_attention(model)
        yield
    finally:
        model.set_attn_implementation(attention)
        for module in patched:
            module.__dict__.pop("forward", None)
        for hook in hooks:
            hook.remove()


def hidden_states(model: Any, packing: Pack) -> Tensor:
    """(tokens, hidden) float32 after the last norm; inside `lean`."""
    output = model.get_decoder()(
        input_ids=packing.ids, position_ids=packing.positions, use_cache=False, packing=packing
    )
    states: Tensor = output.last_hidden_state.squeeze(0)
    return states.float()


class _Norm:
    def __init__(self, gain: Tensor, eps: float, dtype: torch.dtype) -> None:
        self._gain, self._eps, self._dtype = gain, eps, dtype

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = RmsNorm.apply(x, self._gain, self._eps, self._dtype)  # type: ignore[no-untyped-call]
        return y


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 0.0)


def _gain(module: nn.Module) -> Tensor | None:
    """What the norm multiplies by (some families store it less one); None when it is no plain RMS norm."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1:
        return None
    known = _GAINS.get(module)
    if known is None or known[0].device != weight.device or not torch.equal(known[0], weight):
        _GAINS[module] = known = weight.detach().clone(), _measured_gain(module, weight)
    return known[1]


def _measured_gain(module: nn.Module, weight: Tensor) -> Tensor | None:
    eps = _eps(module)
    probe = torch.linspace(-1, 2, len(weight), device=weight.device)[None]
    with torch.no_grad():
        gain = module(torch.ones_like(probe))[0].float() * (1 + eps) ** 0.5
        expected = probe * torch.rsqrt(probe.square().mean() + eps) * gain
        return gain if torch.allclose(module(probe).float(), expected, rtol=1e-3, atol=1e-5) else None
