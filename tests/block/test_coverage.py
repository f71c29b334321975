"""Coverage: index maps, files, and the algebra between a block's slice and the LLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.adapter import factor_key, factor_shape, init_factors, slice_factors
from legolm.adapter.slices import add_slice
from legolm.block import Coverage
from legolm.block.coverage import load_coverage, save_coverage
from legolm.errors import LegolmError
from legolm.models import FAMILIES, Shape

SHAPE = Shape("llama", layers=3, hidden=8, neurons=6, kv_groups=2, queries_per_group=2, head_dim=2)


def subset(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))


@st.composite
def coverages(draw: st.DrawFn) -> Coverage:
    """Of any family: fused matrices, and queries, keys and values side by side, among them."""
    layers = draw(subset(SHAPE.layers))
    return Coverage(
        replace(SHAPE, family=draw(st.sampled_from(sorted({"llama", *FAMILIES})))),
        layers,
        tuple(draw(subset(SHAPE.kv_groups)) for _ in layers),
        tuple(draw(subset(SHAPE.neurons)) for _ in layers),
    )


def test_rows_and_columns_by_hand() -> None:
    coverage = Coverage(SHAPE, (2,), ((1,),), ((0, 5),))
    # KV group 1 has query heads 2 and 3 of width 2, and key rows 2 and 3.
    assert coverage.rows(2, "self_attn.q_proj").tolist() == [4, 5, 6, 7]
    assert coverage.rows(2, "self_attn.k_proj").tolist() == [2, 3]
    assert coverage.cols(2, "self_attn.o_proj").tolist() == [4, 5, 6, 7]
    assert coverage.rows(2, "mlp.gate_proj").tolist() == [0, 5]
    assert coverage.cols(2, "mlp.down_proj").tolist() == [0, 5]
    assert coverage.rows(2, "mlp.down_proj") is None
    # q 4x8, k 2x8, v 2x8, o 8x4, gate 2x8, up 2x8, down 8x2 of three layers of 64+32+32+64+48+48+48.
    assert coverage.kept_weights == 32 + 16 + 16 + 32 + 16 + 16 + 16
    assert coverage.sparsity == pytest.approx(1 - 144 / (3 * 336))


@given(coverages(), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=40)
def test_slicing_then_merging_equals_merging_then_slicing(coverage: Coverage, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = {
        key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for key, tensor in init_factors(coverage.shape, None, rank, 0).items()
    }
    sliced = slice_factors(coverage, whole, rank)
    for layer in coverage.layers:
        for module in coverage.shape.modules:
            a, b = factor_key(layer, module, "A"), factor_key(layer, module, "B")
            product = whole[b] @ whole[a]
            rows, cols = coverage.rows(layer, module), coverage.cols(layer, module)
            product = product if rows is None else product[rows]
            product = product if cols is None else product[:, cols]
            torch.testing.assert_close(sliced[b] @ sliced[a], product, rtol=1e-12, atol=1e-12)
    assert {key: tuple(tensor.shape) for key, tensor in sliced.items()} == {
        key: factor_shape(coverage, key, rank) for key in sliced
    }


@given(coverages(), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=40)
def test_adding_a_slice_is_the_transpose_of_slicing(coverage: Coverage, rank: int, seed: int) -> None:
    """<slice(x), y> = <x, place(y)> for all x and y: nothing lands where the block does not read."""
    generator = torch.Generator().manual_seed(seed)
    whole = {
        key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for key, tensor in init_factors(coverage.shape, None, 3, 0).items()
    }
    for key, local in slice_factors(coverage, whole, rank).items():
        other = torch.randn(local.shape, generator=generator, dtype=torch.float64)
        placed = torch.zeros_like(whole[key])
        add_slice(coverage, key, placed, rank, other)
        assert float((local * other).sum()) == pytest.approx(float((whole[key] * placed).sum()))
        assert int((placed != 0).sum()) <= other.numel()


@given(coverages(), st.booleans())
@settings(max_examples=25)
def test_files_give_back_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, coverage: Coverage, bits: bool
) -> None:
    if bits:
        layer, module = coverage.layers[0], next(iter(coverage.shape.modules))
        rows, cols = coverage.matrix(layer, module)
        mask = torch.arange(rows * cols).view(rows, cols) % 3 != 0
        masks = {f"layers.{layer}.{module}": mask}
        coverage = Coverage(coverage.shape, coverage.layers, coverage.groups, coverage.neurons, masks)
    path = tmp_path_factory.mktemp("coverage") / "coverage.safetensors"
    save_coverage(coverage, path)
    found = load_coverage(path)
    assert found.shape == coverage.shape
    assert (found.layers, found.groups, found.neurons) == (coverage.layers, coverage.groups, coverage.neurons)
    assert found.hash == coverage.hash
    assert found.kept_weights == coverage.kept_weights
    assert all(torch.equal(found.masks[key], mask) for key, mask in coverage.masks.items())


def test_hash_tells_coverages_apart() -> None:
    one = Coverage(SHAPE, (0,), ((0,),), ((0, 1),))
    assert one.hash != Coverage(SHAPE, (0,), ((0,),), ((0, 2),)).hash
    assert one.hash != Coverage(SHAPE, (0,), ((1,),), ((0, 1),)).hash
    assert one.hash != Coverage(replace(SHAPE, family="qwen2"), (0,), ((0,),), ((0, 1),)).hash


@given(coverages())
@settings(max_examples=60)
def test_rows_count_what_the_units_say(coverage: Coverage) -> None:
    """Each row is of the LLM's, once, ascending, and as many as kept groups and neurons make."""
    shape = coverage.shape
    for j, layer in enumerate(coverage.layers):
        part = replace(shape, kv_groups=len(coverage.groups[j]), neurons=len(coverage.neurons[j]))
        for module in shape.modules:
            assert coverage.matrix(layer, module) == part.matrix(module)
            for index, size in zip(
                (coverage.rows(layer, module), coverage.cols(layer, module)), shape.matrix(module), strict=True
            ):
                assert index is None or index.tolist() == sorted(set(index.tolist()) & set(range(size)))


@pytest.mark.parametrize(
    ("layers", "groups", "neurons"),
    [((3,), ((0,),), ((0,),)), ((0,), ((1, 0),), ((0,),)), ((0,), ((0,),), ((6,),)), ((0,), ((),), ((0,),))],
)
def test_indices_that_do_not_fit_are_refused(layers: tuple, groups: tuple, neurons: tuple) -> None:
    with pytest.raises(LegolmError, match="ascending indices"):
        Coverage(SHAPE, layers, groups, neurons)


def test_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "coverage.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all")
    with pytest.raises(LegolmError, match="cut the block again"):
        load_coverage(path)
