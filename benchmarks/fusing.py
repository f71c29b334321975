"""Would torch.compile pay for what stands around a training step's products?

    python benchmarks/fusing.py [--tokens 388] [--repeats 200]

SwiGLU, RMS norm and rotary positions of a pack of that many tokens in the starter model's sizes, bfloat16, one thread:
medians of eager and of compiled calls, which take turns, and how long the first call takes, which compiles (a second
process finds torch's cache on the disk). `saved_ms` is what a step of 30 layers would save: each function as often as
a step calls it. Last line: one JSON object. Without a C++ compiler torch says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

LAYERS, HIDDEN, NEURONS, HEADS, SIZE = 30, 576, 1536, 9, 64


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def swiglu_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * gain).to(x.dtype)


def norm_back(grad: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    wide, g = x.float(), grad.float() * gain
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    along = (g * wide).sum(-1, keepdim=True) * inverse.pow(3) / x.shape[-1]
    return (g * inverse - wide * along).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def timed(function: Callable[..., Any], args: tuple[Tensor, ...]) -> float:
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=388, help="as eight of the starter's rows have")
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    wide, hidden = (options.tokens, NEURONS), (options.tokens, HIDDEN)
    heads, angles = (HEADS, options.tokens, SIZE), (options.tokens, SIZE)
    norms, ways = 2 * LAYERS + 1, 2
    todo: list[tuple[str, int, Callable[..., Any], tuple[Tensor, ...]]] = [
        ("swiglu", LAYERS, swiglu, (some(*wide), some(*wide))),
        ("swiglu, backward", LAYERS, swiglu_back, (some(*wide), some(*wide), some(*wide))),
        ("norm", norms, norm, (some(*hidden), torch.randn(HIDDEN))),
        ("norm, backward", norms, norm_back, (some(*hidden), some(*hidden), torch.randn(HIDDEN))),
        ("rotary, queries", ways * LAYERS, rotary, (some(*heads), some(*angles), some(*angles))),
    ]
    found, first = dict[str, dict[str, float]](), 0.0
    for name, times, function, args in todo:
        compiled = torch.compile(function, dynamic=True)
        began = time.perf_counter()
        compiled(*args)
        first += time.perf_counter() - began
        pairs = [(timed(function, args), timed(compiled, args)) for _ in range(options.repeats)]
        eager, fused = (median(side) * 1e6 for side in zip(*pairs, strict=True))
        found[name] = {"eager_us": round(eager), "compiled_us": round(fused), "a_step": times}
        print(f"{name}: {eager:.0f} us eager, {fused:.0f} us compiled", flush=True)
    saved = sum((one["eager_us"] - one["compiled_us"]) * one["a_step"] for one in found.values()) / 1000
    print(json.dumps({"functions": found, "first_calls_s": round(first, 1), "saved_ms": round(saved, 1)}))


if __name__ == "__main__":
    main()
