"""Are fit, cut, merge and score on the accelerator what they are on the CPU? One function a check, for `gpu.py`.

The reference is the CPU in float32. `rel` is ‖got − wanted‖ / ‖wanted‖, `max_abs` the largest difference. In float32
both sides differ by the order of sums only, which Adam's first steps and a cut's choices among equals enlarge; in
bfloat16 they differ by its rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legolm.adapter import Tensors, init_factors, merge, slice_factors
from legolm.block import Block, Coverage
from legolm.config import BlockConfig, CalibrationConfig, Precision, RecoverConfig, TrainConfig
from legolm.data import Tokens
from legolm.evaluation.answers import score_each
from legolm.evaluation.perplexity import window_losses
from legolm.finetune import Task, fit
from legolm.models import decoder_layers, dtype_of, fingerprint, load_model, shape_of
from legolm.prune import cut_blocks
from legolm.system import Progress
from random_model import llama, save_random

CPU = torch.device("cpu")
RANK, SCALE = 8, 2.0
Found = dict[str, Any]


def compared(got: Tensor, wanted: Tensor, tolerance: float) -> Found:
    """`max_abs`, `rel`, and whether `rel` is within the tolerance and all is finite."""
    got, wanted = got.detach().cpu().double().flatten(), wanted.detach().cpu().double().flatten()
    error = got - wanted
    rel = float(error.norm() / wanted.norm())
    return {
        "max_abs": float(error.abs().max()),
        "rel": rel,
        "tolerance": tolerance,
        "ok": bool(got.isfinite().all()) and rel <= tolerance,
    }


@dataclass(frozen=True)
class World:
    """A random model in `folder`, the accelerator, and examples."""

    folder: Path
    device: torch.device
    small: bool

    @cached_property
    def base(self) -> Path:
        """Two layers, narrow enough for the CPU, which computes everything too; or a toy."""
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        if not self.small:
            sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        # Weights larger than usual: with those of a fresh model attention looks at all tokens alike.
        config = llama(**sizes, num_hidden_layers=2, vocab_size=1024, initializer_range=0.06)
        save_random(self.folder / "base", config)
        return self.folder / "base"

    def rows(self, count: int, longest: int) -> list[Tokens]:
        """Random examples of about half a prompt, of eight tokens to `longest`, which comes once at least.

        All begin alike, as conversations do in a template.
        """
        draw = torch.Generator().manual_seed(0)
        lengths = [longest, *torch.randint(8, longest, (count - 1,), generator=draw).tolist()]
        return [Tokens((5, 6, 7, *torch.randint(1024, (n - 3,), generator=draw).tolist()), n // 2) for n in lengths]

    def blocks(self, device: torch.device | None) -> dict[str, Block]:
        """One of each kind, cut on the device; where the product chooses to, without one."""
        text = CalibrationConfig(text="pydoc", samples=4 if self.small else 8, length=64 if self.small else 128)
        half, groups = (64, 1) if self.small else (256, 2)
        recover = RecoverConfig(steps=2, rank=RANK)
        structured = {"intermediate_size": half, "num_key_value_heads": groups}
        targets: list[dict[str, Any]] = [
            {"name": "structured", "method": "structured", **structured},
            {"name": "recovered", "method": "structured", **structured, "recover": recover},
            {"name": "wanda", "method": "wanda", "sparsity": 0.5},
            {"name": "sparsegpt", "method": "sparsegpt", "pattern": "2:4"},
        ]
        out = Path(tempfile.mkdtemp(dir=self.folder))
        wanted = [(BlockConfig(calibration=text, **target), out / target["name"]) for target in targets]
        found = cut_blocks(self.base, fingerprint(self.base), wanted, 0, "fp32", Progress(), device=device)
        return {block.name: block for block in found}

    @cached_property
    def here(self) -> dict[str, Block]:
        """Those cut on the CPU."""
        return self.blocks(CPU)

    def whole(self) -> tuple[Path, Coverage]:
        """The model itself."""
        return self.base, Coverage.full(shape_of(load_model(self.base).config))

    def sparse(self) -> tuple[Path, Coverage]:
        """An unstructured block."""
        return self.here["wanda"].path, self.here["wanda"].coverage


def _start(coverage: Coverage, noise: float = 0.0) -> Tensors:
    """Factors; with `noise` B is not zero."""
    factors = slice_factors(coverage, init_factors(coverage.shape, None, RANK, 0), RANK)
    draw = torch.Generator().manual_seed(1)
    return {key: value + noise * torch.randn(value.shape, generator=draw) for key, value in factors.items()}


def _fitted(
    world: World,
    of: tuple[Path, Coverage],
    device: torch.device,
    longest: int,
    precision: Precision = "fp32",
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(all changes in one, first and last loss) of four steps."""
    path, coverage = of
    model = load_model(path, dtype_of(precision)).to(device)
    config = TrainConfig(batch_size=4, learning_rate=1e-3, gradient_checkpointing=checkpointing)
    start = _start(coverage, noise=0.01)
    task = Task(
        model, coverage, start, SCALE, world.rows(8, longest), config, precision, steps=4, seed=0, dropout=dropout
    )
    delta, metrics = fit(task)
    changes = torch.cat([delta[key].flatten() for key in sorted(delta)])
    return changes, torch.tensor([metrics["loss_first"], metrics["loss_last"]])


def fit_packed(world: World) -> Found:
    """Training; attention by our own packed kernel."""
    return _fit_as_on_cpu(world, world.whole(), 160)


def fit_long(world: World) -> Found:
    """The same with an example that is longer than that kernel takes."""
    return _fit_as_on_cpu(world, world.whole(), 600)


def fit_masked(world: World) -> Found:
    """Training under a mask."""
    return _fit_as_on_cpu(world, world.sparse(), 160)


def fit_checkpointing(world: World) -> Found:
    """Layers computed again in the backward pass, beside the CPU without."""
    return _fit_as_on_cpu(world, world.whole(), 160, checkpointing=True)


def _fit_as_on_cpu(world: World, of: tuple[Path, Coverage], longest: int, checkpointing: bool = False) -> Found:
    wanted, losses = _fitted(world, of, CPU, longest)
    got, found = _fitted(world, of, world.device, longest, checkpointing=checkpointing)
    answer = compared(got, wanted, 1e-2)
    loss = compared(found, losses, 1e-4)
    return answer | {"loss_rel": loss["rel"], "ok": answer["ok"] and loss["ok"]}


def fit_bf16(world: World) -> Found:
    """First and last loss in bfloat16, beside float32 on the CPU."""
    wanted = _fitted(world, world.whole(), CPU, 160)[1]
    return compared(_fitted(world, world.whole(), world.device, 160, "bf16")[1], wanted, 2e-2)


def fit_masked_bf16(world: World) -> Found:
    """The same under a mask."""
    wanted = _fitted(world, world.sparse(), CPU, 160)[1]
    return compared(_fitted(world, world.sparse(), world.device, 160, "bf16")[1], wanted, 2e-2)


def fit_dropout(world: World) -> Found:
    """Losses with dropout are near those without and not the same; the caller's random numbers stay as they were."""
    plain = _fitted(world, world.whole(), CPU, 160)[1]

    def state() -> Tensor:
        return torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else torch.get_rng_state()

    before = state()
    dropped = _fitted(world, world.whole(), world.device, 160, dropout=0.1)[1]
    found = compared(dropped, plain, 0.05)
    untouched = bool(torch.equal(before, state()))
    return found | {"generator_untouched": untouched, "ok": found["ok"] and untouched and found["rel"] > 0}


def cut(world: World) -> Iterator[Found]:
    """One of each kind of block: how far each is from the dense model, and the share of units or weights both keep.

    Which of two near equals goes is chance: on the CPU alone, inputs off by 1e-5 change a fiftieth of the neurons and
    a hundredth of SparseGPT's mask. So it is the cut's quality that must be the same: ‖logits − the dense model's‖,
    within a hundredth.
    """
    ids = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(2))

    def logits(path: Path) -> Tensor:
        with torch.no_grad():
            found: Tensor = load_model(path)(input_ids=ids).logits
        return found

    dense = logits(world.base)
    on_gpu = world.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    there = world.blocks(None if on_gpu else CPU)
    if on_gpu and torch.cuda.max_memory_allocated() == before:
        raise RuntimeError("blocks were not cut on the device")
    for name, block in world.here.items():
        other = there[name]
        same, all_ = 0.0, 0.0
        for one, two in _kept(block.coverage, other.coverage):
            same += float((one == two).sum())
            all_ += one.numel()
        got, wanted = ((logits(side.path) - dense).norm() for side in (other, block))
        found = compared(got, wanted, 0.01)
        agreement = same / all_
        yield found | {"block": name, "agreement": agreement, "ok": found["ok"] and agreement >= 0.9}


def _kept(one: Coverage, two: Coverage) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of bool tensors: which neurons, groups and weights both keep."""
    for field, count in (("neurons", one.shape.neurons), ("groups", one.shape.kv_groups)):
        for kept in zip(getattr(one, field), getattr(two, field), strict=True):
            first, second = (torch.zeros(count).index_fill_(0, torch.tensor(side), 1).bool() for side in kept)
            yield first, second
    for key, mask in one.masks.items():
        yield mask, two.masks[key]


def places_off(got: Tensor, exact: Tensor) -> Tensor:
    """How far each number is from the exact one, in units of bfloat16's last place there."""
    return (got - exact) / torch.exp2(exact.abs().clamp(min=1e-30).log2().floor() - 7)


def merge_fp32(world: World) -> Found:
    """Merged weights in float32."""
    got, wanted = (_merged(world, device, torch.float32) for device in (world.device, CPU))
    return compared(got, wanted, 1e-5)


def merge_bf16(world: World) -> Found:
    """Merged weights in bfloat16, rounded up or down from the exact ones: off by less than a last place each, by a
    hundredth of one in the mean; zeros stay."""
    exact = _merged(world, CPU, torch.float32, grid=True)
    got = _merged(world, world.device, torch.bfloat16).float()
    places = places_off(got, exact)
    found = compared(got, exact, 2**-7)
    worst, mean = float(places.abs().max()), float(places.mean())
    zeros = bool((got[exact == 0] == 0).all())
    ok = found["ok"] and worst < 1.01 and abs(mean) < 0.01 and zeros
    return found | {"worst_places": worst, "mean_places": mean, "zeros_stay": zeros, "ok": ok}


def _merged(world: World, device: torch.device, dtype: torch.dtype, grid: bool = False) -> Tensor:
    """All linear weights of the sparse block after a merge; with `grid` merged into weights rounded to bfloat16."""
    path, coverage = world.sparse()
    model = load_model(path, torch.bfloat16 if grid else dtype)
    for layer in decoder_layers(model):
        for module in coverage.shape.modules:
            layer.get_submodule(module).to(dtype)
    model.to(device)
    merge(model, coverage, _start(coverage, noise=0.01), SCALE)
    weights = [
        layer.get_parameter(f"{module}.weight").detach().flatten().cpu()
        for layer in decoder_layers(model)
        for module in coverage.shape.modules
    ]
    return torch.cat(weights)


def score_fp32(world: World) -> Found:
    """Loss of each answer, and which are exact."""
    return _scored(world, "fp32", 1e-4)


def score_bf16(world: World) -> Found:
    """The same in bfloat16, beside float32 on the CPU."""
    return _scored(world, "bf16", 2e-2)


def _scored(world: World, precision: Precision, tolerance: float) -> Found:
    rows = world.rows(12, 160)
    wanted = score_each(load_model(world.base), rows, 4, "fp32")
    got = score_each(load_model(world.base, dtype_of(precision)).to(world.device), rows, 4, precision)
    found = compared(torch.from_numpy(got.losses), torch.from_numpy(wanted.losses), tolerance)
    agree = float((got.exact == wanted.exact).mean())
    return found | {"exact_agree": agree, "ok": found["ok"] and agree == 1}


def text_fp32(world: World) -> Found:
    """Losses of windows of text, as perplexity has them."""
    windows = torch.tensor([world.rows(1, 96)[0].ids] * 2)
    got, wanted = (
        torch.from_numpy(window_losses(load_model(world.base).to(device), windows, "fp32"))
        for device in (world.device, CPU)
    )
    return compared(got, wanted, 1e-4)


CHECKS: tuple[Callable[[World], Found | Iterator[Found]], ...] = (
    fit_packed,
    fit_long,
    fit_checkpointing,
    fit_bf16,
    fit_dropout,
    score_fp32,
    score_bf16,
    text_fp32,
    cut,
    merge_fp32,
    merge_bf16,
    fit_masked,
    fit_masked_bf16,
)
