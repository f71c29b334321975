"""Channels of GGUF files are balanced: the same function, of which quantizing takes less."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import assert_one_line, legolm
from legolm.block import Block
from legolm.export import export
from legolm.export import gguf as target
from legolm.export import gguf_adapter as adapters
from legolm.export.gguf_balance import READ_BY, Balance, balance_of
from legolm.export.gguf_layout import layout_of
from legolm.export.gguf_tokens import vocabulary_of
from legolm.export.gguf_write import write_gguf
from legolm.models import load_config, load_model, load_tokenizer

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

WRITTEN = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "phi3", "gpt2", "gpt_neox")
GIVERS = {"olmo2": {"ffn_up"}, "gpt2": {"attn_norm", "ffn_norm"}, "gpt_neox": {"attn_norm", "ffn_norm"}}
"""Where it is other than all three: norms behind the matrices, and no gate."""


def read(file: Path) -> dict[str, Tensor]:
    return {one.name: torch.tensor(one.data) for one in gguf.GGUFReader(file).tensors}


def plain(_model: object, _tokenizer: object, _layout: object) -> Balance:
    return Balance()


def error(line: str) -> float:
    found = re.search(r"error (\S+),", line)
    assert found is not None
    return float(found[1])


def test_scales_by_hand() -> None:
    balance = Balance({"blk.0.ffn_norm": torch.tensor([2.0, 0.5]), "blk.0.ffn_up": torch.tensor([4.0, 1.0, 0.25])})
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert balance.weight("blk.0.ffn_norm.weight", torch.ones(2)).tolist() == [0.5, 2.0]
    assert balance.weight("blk.0.ffn_norm.bias", torch.ones(2)).tolist() == [0.5, 2.0]
    assert balance.weight("blk.0.ffn_gate.weight", rows).tolist() == [[2.0, 1.0], [6.0, 2.0], [10.0, 3.0]]
    assert balance.weight("blk.0.ffn_gate.bias", torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert balance.weight("blk.0.ffn_up.weight", rows).tolist() == [[0.5, 0.25], [6.0, 2.0], [40.0, 12.0]]
    assert balance.weight("blk.0.ffn_down.weight", rows.T).tolist() == [[4.0, 3.0, 1.25], [8.0, 4.0, 1.5]]
    assert torch.equal(balance.weight("blk.1.ffn_up.weight", rows), rows)
    assert torch.equal(balance.weight("token_embd.weight", rows), rows)


@pytest.mark.parametrize("variant", WRITTEN)
def test_products_stay_and_sizes_become_alike(variant: str, block: Callable[..., Block], tmp_path: Path) -> None:
    path = block(variant).path
    config, tokenizer = load_config(path), load_tokenizer(path)
    layout, vocabulary = layout_of(config, "b"), vocabulary_of(tokenizer, config.vocab_size, None)
    balance = balance_of(load_model(path), tokenizer, layout)
    files = []
    for name, one in (("balanced", balance), ("plain", Balance())):
        write_gguf(path, tmp_path / name, layout, vocabulary, "f32", "b", one)
        files.append(read(tmp_path / name))
    ours, theirs = files
    wanted = GIVERS.get(variant, {"attn_norm", "ffn_norm", "ffn_up"})
    assert balance.scales.keys() == {f"blk.{index}.{giver}" for index in (0, 1) for giver in wanted}
    for one, other in zip(products(ours), products(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    scaled = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert {f"{name}.weight" for name in balance.scales} <= scaled
    assert not [name for name in scaled if "attn_output" in name or not name.startswith("blk.")]


def products(file: dict[str, Tensor]) -> list[Tensor]:
    """Of each channel that is scaled, what gives it times the columns that read it: all that a layer computes."""
    found = []
    for block in ("blk.0", "blk.1"):
        up, down = file[f"{block}.ffn_up.weight"], file[f"{block}.ffn_down.weight"]
        for kind in ("weight", "bias"):
            for norm in ("attn_norm", "ffn_norm"):
                if (given := file.get(f"{block}.{norm}.{kind}")) is None:
                    continue
                readers = [file[name] for one in READ_BY[norm] if (name := f"{block}.{one}.weight") in file]
                if f"{block}.ffn_gate.weight" in file:
                    readers = [torch.einsum("rn,nc->rnc", down, one) if one is up else one for one in readers]
                found += [one * given for one in readers]
        if f"{block}.ffn_gate.weight" in file:
            found += [down * file[f"{block}.ffn_up.bias"]] if f"{block}.ffn_up.bias" in file else []
        if f"{block}.ffn_norm.weight" not in file:
            found.append(torch.einsum("rn,nc->rnc", down, up))
    return found


@pytest.fixture(scope="module")
def uneven(block: Callable[..., Block], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block of a Llama whose norms and `up` give every 32nd channel a hundredfold, which is taken as little of."""
    path = tmp_path_factory.mktemp("uneven") / "m"
    shutil.copytree(block("llama").path, path)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "input_layernorm" in name or "post_attention_layernorm" in name:
            tensor[::32] *= 100
        elif any(one in name for one in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, ::32] /= 100
        if "up_proj" in name:
            tensor[::32] *= 100
        elif "down_proj" in name:
            tensor[:, ::32] /= 100
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_channels_that_are_large_cost_their_neighbours_nothing(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = export(str(uneven), "gguf", tmp_path / "b.gguf")
    monkeypatch.setattr(target, "balance_of", plain)
    before = export(str(uneven), "gguf", tmp_path / "plain.gguf")
    assert error(before.lines[-1]) > 5 * error(found.lines[-1])


def test_scales_that_nobody_takes_are_found_out(
    block: Callable[..., Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Balance, "columns", lambda _self, _name, tensor: tensor)
    done = legolm("export", block("llama").path, "--to", "gguf", "--out", tmp_path / "b.gguf")
    assert_one_line(done, "llama.cpp (f16) does not compute what the checkpoint does", "nothing was exported")


def test_zeros_of_masks_stay(block: Callable[..., Block], tmp_path: Path) -> None:
    masked = block("llama", method="magnitude", sparsity=0.5)
    export(str(masked.path), "gguf", tmp_path / "m.gguf", settings={"quant": "f16"})
    for name, tensor in read(tmp_path / "m.gguf").items():
        if name.startswith("blk.") and tensor.dim() == 2:
            assert (tensor == 0).float().mean() == pytest.approx(0.5, abs=0.01), name


def test_adapters_fit_the_file_that_was_balanced_like_them(
    exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = exported_run.parent.parent / "blocks" / "b"
    found = export(str(cut), "gguf", tmp_path / "b.gguf", settings={"quant": "f32"})
    assert "LoRA files for it are those of --to gguf-adapter" in found.lines[-2]
    export(str(exported_run), "gguf-adapter", tmp_path / "fr.gguf")
    assert gguf.GGUFReader(tmp_path / "fr.gguf").fields["legolm.balanced"].contents() is True
    monkeypatch.setattr(adapters, "balance_of", plain)
    export(str(exported_run), "gguf-adapter", tmp_path / "plain.gguf")  # as another program would write it
    assert_one_line(
        legolm("serve", tmp_path / "b.gguf", "--quant", "f16"), "--quant: only with a model that is no GGUF"
    )
    done = legolm("serve", tmp_path / "b.gguf", "--port", 0, "--adapter", tmp_path / "plain.gguf")
    assert_one_line(done, "is for a file of", "channels are not balanced")
