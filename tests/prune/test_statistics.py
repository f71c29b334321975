"""Private calibration: what clients send adds up to what pooled text would give."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from legolm.config import BlockConfig, CalibrationConfig, RunConfig, validate
from legolm.errors import LegolmError
from legolm.models import fingerprint, load_config, shape_of
from legolm.plan import make_plan
from legolm.prune import Moments, collect, collected, cut_blocks, flat, save_statistics, sketched
from legolm.prune.statistics import Statistics, load_statistics
from legolm.system import Progress

Collect = Callable[..., Path]


@pytest.fixture
def base(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture
def statistics(base: Path, tmp_path: Path) -> Collect:
    def make(name: str, tokens: torch.Tensor, needs: str = "full") -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_statistics(collect(base, fingerprint(base), tokens, needs, "fp32", Progress()), path)  # type: ignore[arg-type]
        return path

    return make


def load(base: Path, *paths: Path) -> Statistics:
    return load_statistics(paths, shape_of(load_config(base)), fingerprint(base))


@pytest.mark.parametrize("needs", ["full", "diagonal"])
def test_the_sums_of_three_clients_are_those_of_their_pooled_text(base: Path, statistics: Collect, needs: str) -> None:
    tokens = torch.randint(250, (11, 32), generator=torch.Generator().manual_seed(0))
    apart = [statistics(f"client-{i}", part, needs) for i, part in enumerate(tokens.split([1, 4, 6]))]
    added, pooled = load(base, *apart), load(base, statistics("pooled", tokens, needs))
    assert set(added.sums) == set(pooled.sums) and len(pooled.sums) == 2 * 4
    for name, moments in pooled.sums.items():
        assert added.sums[name].tokens == moments.tokens == 11 * 32
        torch.testing.assert_close(added.sums[name].sum, moments.sum, rtol=1e-4, atol=1e-4)


def test_each_layer_runs_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    run, ran = Qwen3DecoderLayer.forward, list[int]()

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        ran.append(self.self_attn.layer_idx)
        return run(self, *given, **named)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", counted)
    collect(base, fingerprint(base), torch.arange(64).view(2, 32), "full", "fp32", Progress())
    assert ran == [0, 1]


def test_who_sends_sums_never_holds_more_than_a_layer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments of all layers are 5 GB for a model of a billion parameters; a weak device only sketches them."""
    alive, most, made = list[weakref.ref[Moments]](), list[int](), Moments.__init__

    def counted(self: Moments, *given: Any) -> None:
        made(self, *given)
        alive.append(weakref.ref(self))
        most.append(sum(one() is not None for one in alive))

    monkeypatch.setattr(Moments, "__init__", counted)

    def seen() -> Iterator[tuple[str, Moments]]:
        tokens = torch.randint(250, (2, 32), generator=torch.Generator().manual_seed(0))
        return collected(base, tokens, "full", "fp32", Progress())

    sketched(seen(), 4, 0)
    assert len(most) == 2 * 4 and max(most) <= 4 + 1, most  # the last one of the layer before is let go with the next
    alive.clear(), most.clear()
    flat(seen())
    assert max(most) <= 4 + 1, most


@pytest.mark.parametrize(
    "target",
    [
        {"method": "wanda", "sparsity": 0.5},
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "structured", "intermediate_size": 40, "num_key_value_heads": 1},
    ],
    ids=["wanda", "sparsegpt", "structured"],
)
def test_a_block_cut_by_the_sums_is_the_block_cut_by_pooled_sums(
    target: dict, base: Path, statistics: Collect, tmp_path: Path
) -> None:
    tokens = torch.randint(250, (8, 32), generator=torch.Generator().manual_seed(1))
    apart = [statistics(f"client-{i}", part) for i, part in enumerate(tokens.split(2))]
    blocks = []
    for name, files in (("apart", apart), ("pooled", [statistics("pooled", tokens)])):
        sums = CalibrationConfig(statistics=tuple(map(str, files)))
        spec = BlockConfig(name="b", calibration=sums, **target)
        blocks += cut_blocks(base, fingerprint(base), [(spec, tmp_path / name)], 0, "fp32", Progress())
    assert blocks[0].coverage.hash == blocks[1].coverage.hash


def test_files_that_do_not_fit_are_refused(
    base: Path, tiny: Callable[[str], Path], statistics: Collect, tmp_path: Path
) -> None:
    tokens = torch.randint(250, (2, 32))
    full, squares = statistics("full", tokens), statistics("squares", tokens, "diagonal")
    with pytest.raises(LegolmError, match="some files are squares only"):
        load(base, full, squares)
    with pytest.raises(LegolmError, match="squares only, for wanda"):
        spec = BlockConfig(
            name="b", method="sparsegpt", sparsity=0.5, calibration=CalibrationConfig(statistics=(str(squares),))
        )
        cut_blocks(base, fingerprint(base), [(spec, tmp_path / "b")], 0, "fp32", Progress())
    with pytest.raises(LegolmError, match="was collected on another base model"):
        load_statistics([full], shape_of(load_config(base)), "another")
    (tmp_path / "rubbish.safetensors").write_bytes(b"rubbish")
    with pytest.raises(LegolmError, match=r"is broken \(.*collect it again with `legolm calibrate`"):
        load(base, tmp_path / "rubbish.safetensors")
    with pytest.raises(LegolmError, match=r"none\.safetensors: no such file"):
        load(base, tmp_path / "none.safetensors")
    assert not (tmp_path / "b").exists()


def test_the_plan_refuses_sums_that_a_cut_would_refuse(
    base: Path, tiny: Callable[[str], Path], statistics: Collect, three_clients: Any, tmp_path: Path
) -> None:
    tokens = torch.randint(250, (2, 32))
    full, squares = statistics("full", tokens), statistics("squares", tokens, "diagonal")
    short, whole = tmp_path / "short.safetensors", load_file(full)
    header = safe_open(full, framework="pt").metadata()
    name = next(iter(whole))
    save_file(whole | {name: whole[name][:-1].clone()}, short, header)
    raw = three_clients(tmp_path, ("dense", "dense", "dense")) | {"model": str(base)}

    def plan(method: str, *files: Path, model: Path = base, **target: Any) -> None:
        sums = {"statistics": list(map(str, files))}
        block = {"name": "b", "method": method, "calibration": sums, "recover": {"steps": 0}}
        blocks = [*raw["blocks"], block | (target or {"sparsity": 0.5})]
        make_plan(validate(RunConfig, raw | {"model": str(model), "blocks": blocks}, "test"))

    plan("wanda", squares)
    plan("sparsegpt", full)
    for method, target in (("sparsegpt", {}), ("structured", {"intermediate_size": 64})):
        with pytest.raises(LegolmError, match=r"block b: calibration.statistics: these are squares only, for wanda"):
            plan(method, squares, **target)
    with pytest.raises(LegolmError, match=r"block b: calibration.statistics: some files are squares only"):
        plan("wanda", full, squares)
    with pytest.raises(LegolmError, match=r"block b: .*full.safetensors was collected on another base model"):
        plan("wanda", full, model=tiny("llama"))
    with pytest.raises(LegolmError, match=r"block b: .*short.safetensors: is broken \(sums .* of another size"):
        plan("sparsegpt", short)
    with pytest.raises(LegolmError, match=r"block b: .*none.safetensors: no such file"):
        plan("wanda", tmp_path / "none.safetensors")
    again = tmp_path / "again.safetensors"
    again.symlink_to(full)
    with pytest.raises(LegolmError, match=r"statistics`: .*full.safetensors is named twice, so that its client would"):
        plan("wanda", full, again)
