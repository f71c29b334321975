"""The bit masks and the weights that they keep: at half of the weights 0.53 of a float32 matrix, 0.56 of bfloat16.

A folder like a checkpoint's, with `sparse.safetensors` in place of its weights: of a matrix with a mask its kept
values, row by row, in one dimension; all others as they are. The masks are those of `coverage.safetensors`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from legolm.block import Coverage, load_coverage
from legolm.errors import LegolmError, brief
from legolm.export.source import Source
from legolm.export.target import exporter
from legolm.models import CheckpointWriter, copy_side_files, find_model, load_model, load_tokenizer, read_weights
from legolm.system import open_tensors

FILE = "sparse.safetensors"


def _check_masks(source: Source) -> None:
    """Raise `LegolmError` where there are none."""
    if not source.coverage.masks:
        raise LegolmError(
            f"--to sparse: {source.name} has no bit masks, so nothing to leave out; hf, gguf and onnx can hold it"
        )


@exporter("sparse", check=_check_masks)
def sparse(source: Source, out: Path) -> list[str]:
    """A folder for `legolm.load`: exact, and as small as bit masks and their values are."""
    masks = _masks(source.coverage)
    out.mkdir()
    copy_side_files(source.path, out)
    dense, tensors = 0, {}
    for name, tensor in read_weights(source.path):
        mask = masks.get(name)
        dense += tensor.nbytes
        if mask is not None and bool(tensor[~mask].any()):
            raise LegolmError(f"{source.name}: {name} has weights where its mask has none; cut the block again")
        tensors[name] = tensor if mask is None else tensor[mask]
    save_file(tensors, out / FILE)
    _check(source, out)
    share = sum(tensor.nbytes for tensor in tensors.values()) + sum((mask.numel() + 7) // 8 for mask in masks.values())
    return [f"{share / dense:.3f} of the bytes of its dense weights, masks included; every weight is the same again"]


def load(name: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a block, an LLM, a run's final model (`RUN:CLIENT`), or a folder that `--to sparse` wrote.

    The model is transformers', in float32 on the CPU, in eval mode. Raises `LegolmError` for what is none of these.
    """
    if not (Path(name) / FILE).is_file():
        path = find_model(str(name))
        return load_model(path), load_tokenizer(path)
    with TemporaryDirectory(prefix="legolm-") as folder:
        spread(Path(name), Path(folder))
        try:
            return load_model(Path(folder)), load_tokenizer(Path(folder))
        except LegolmError as error:
            why = str(error).replace(folder, str(name)).rpartition("; ")[0] or str(error)
            raise LegolmError(f"sparse {name}: is broken ({brief(why)}); export the block again") from None


def spread(path: Path, out: Path) -> None:
    """Write the checkpoint that a sparse folder stands for into `out`. Raises `LegolmError` for a broken one."""
    copy_side_files(path, out)
    masks = _masks(load_coverage(path / "coverage.safetensors"))
    writer = None
    with open_tensors(path / FILE, "sparse ", "export the block again") as handle:
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            tensor: Tensor = handle.get_tensor(name)
            mask = masks.get(name)
            if mask is not None:
                if tensor.dim() != 1 or len(tensor) != int(mask.sum()):
                    raise ValueError(f"{name} has {list(tensor.shape)} values for a mask of {int(mask.sum())}")
                tensor = torch.zeros(mask.shape, dtype=tensor.dtype).masked_scatter_(mask, tensor)
            writer = writer or CheckpointWriter(out, tensor.dtype)
            writer.add("", {name: tensor})
        if writer is None:
            raise ValueError("it is empty")
        writer.close()


def _masks(coverage: Coverage) -> dict[str, Tensor]:
    """Bit masks by the name of the weight in the block's checkpoint."""
    place, prefix = {layer: j for j, layer in enumerate(coverage.layers)}, coverage.shape.entry.layers
    found = {}
    for key, mask in coverage.masks.items():
        _, layer, module = key.split(".", 2)
        found[f"{prefix}.{place[int(layer)]}.{module}.weight"] = mask.T if coverage.shape.entry.transposed else mask
    return found


def _check(source: Source, out: Path) -> None:
    """Read it again: every tensor must be what it was."""
    again = source.scratch / "spread"
    again.mkdir()
    spread(out, again)
    for (name, was), (other, now) in zip(_sorted(source.path), _sorted(again), strict=True):
        if name != other or not torch.equal(was, now):
            raise LegolmError(f"{source.name}: {name} is not the same when it is read again: nothing was exported")
    shutil.rmtree(again)


def _sorted(path: Path) -> Iterator[tuple[str, Tensor]]:
    return iter(sorted(read_weights(path), key=lambda one: one[0]))
