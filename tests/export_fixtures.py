"""Blocks of tiny random models to export, and what a run leaves of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # as in conftest.py
    from legolm.block import Block

SHARP = 8.0
"""Times what is drawn: attention that looks somewhere, or a wrong rotation would hardly show."""


@pytest.fixture(scope="session")
def sharp(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny`, with larger query and key weights."""
    from safetensors.torch import load_file, save_file

    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("sharp") / variant
            shutil.copytree(tiny(variant), made[variant])
            file = made[variant] / "model.safetensors"
            tensors = {
                name: tensor * SHARP if any(one in name for one in ("q_proj", "k_proj", "qkv_proj")) else tensor
                for name, tensor in load_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
        return made[variant]

    return make


@pytest.fixture(scope="session")
def block(sharp: Callable[[str], Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Block]:
    """A block of a sharp variant with 64 of 96 neurons and one KV group of two, where the family lets it go."""
    from legolm.config import BlockConfig, CalibrationConfig
    from legolm.models import fingerprint
    from legolm.prune import cut_blocks
    from legolm.system import Progress

    made: dict[str, Block] = {}

    def make(variant: str, **target: object) -> Block:
        key = variant + repr(target)
        if key not in made:
            target = target or {"intermediate_size": 64, "num_key_value_heads": 1}
            if variant in ("olmo2", "gpt2", "gpt_neox"):  # they keep all
                target.pop("num_key_value_heads", None)
            spec = BlockConfig(
                name="b",
                calibration=CalibrationConfig(text=str(corpus), samples=2, length=64),
                **{"method": "structured"} | target,  # type: ignore[arg-type]
            )
            base, out = sharp(variant), tmp_path_factory.mktemp("cut") / "b"
            (made[key],) = cut_blocks(base, fingerprint(base), [(spec, out)], 0, "fp32", Progress(), str(base))
        return made[key]

    return make


def _make_run(folder: Path, block: Block) -> Path:
    """What a run leaves of one client, `fr`, with this block: the block as it was cut, and what it ended with."""
    import torch

    from legolm.adapter import init_factors, merge, save_adapter, save_factors, slice_factors
    from legolm.block import Manifest, read_block, write_block
    from legolm.models import load_model, load_tokenizer, save_model
    from legolm.runs import seal

    cut, final = folder / "blocks" / "b", folder / "final" / "fr"
    shutil.copytree(block.path, cut)
    (folder / "config.yaml").write_text("{}")
    coverage = block.coverage
    generator = torch.Generator().manual_seed(3)
    factors = slice_factors(coverage, init_factors(coverage.shape, None, 3, seed=1), 3)
    factors = {key: one + 0.1 * torch.randn(one.shape, generator=generator) for key, one in factors.items()}
    model = load_model(cut)
    merge(model, coverage, factors, 0.5)
    save_model(model, load_tokenizer(cut), final, torch.float32)
    save_factors(factors, 0.5, "start", final)
    if not coverage.masks:
        save_adapter(coverage, factors, 0.5, str(cut), final / "adapter")
    manifest = Manifest(
        name="b",
        method=block.method,
        base_fingerprint=block.base_fingerprint,
        coverage_hash=coverage.hash,
        parameters=block.parameters,
        sparsity=block.sparsity,
        details={"client": "fr", "round": 2, "model": block.details["model"]},
    )
    write_block(manifest, coverage, final)
    seal(final)
    return read_block(final).path


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path, Block], Path]:
    """(folder, block) -> the final model of `fr` in a run's folder."""
    return _make_run


@pytest.fixture(scope="session")
def exported_run(block: Callable[..., Block], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final model of `fr` in a run of one client with a structured block."""
    return _make_run(tmp_path_factory.mktemp("run") / "demo", block("llama"))
