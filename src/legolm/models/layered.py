"""Checkpoints layer by layer: read with one decoder layer in memory at a time, and written as the layers come."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from legolm.errors import LegolmError
from legolm.models.checkpoint import SAVE_AGAIN, full_names, load_config, stored_weights
from legolm.models.family import decoder_layers
from legolm.models.finite import check_finite
from legolm.models.rotary import by_own_length
from legolm.models.transposed import as_linears
from legolm.system import open_tensors

CPU = torch.device("cpu")
SHARD_BYTES = 256 << 20
"""A shard is written once it holds as much: what is waiting to be written counts as memory too."""


class LayeredModel:
    """A causal LM in float32 whose decoder layers have weights only inside `layer(index)`; nothing is trainable.

    The weights are on `device` then. What is around the layers (embeddings, final norm) is in memory inside `rest()`.
    """

    def __init__(self, path: Path, device: torch.device = CPU) -> None:
        self.config, self.device = load_config(path), device
        with init_empty_weights():
            # A copy: making the model writes its dtype into the config.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=torch.float32)
        by_own_length(model)
        self._decoder: Any = model.eval().get_decoder()
        self.layers = decoder_layers(model)
        as_linears(self.layers)
        for module in self._decoder.modules():
            module._buffers = {name: buffer.to(device) for name, buffer in module._buffers.items()}
        names = {id(module): name for name, module in model.named_modules()}
        self._prefix, self._layers_prefix = f"{names[id(self._decoder)]}.", f"{names[id(self.layers)]}."
        stored = stored_weights(path)
        self._files = {name: (stored[own][0], own) for own, name in full_names(model, stored).items()}

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Decoder layer `index`, with its weights."""
        layer = self.layers[index]
        return self._loaded(layer, self.layer_prefix(index), list(layer.state_dict()))

    def rest(self) -> AbstractContextManager[Any]:
        """The decoder, with the weights around its layers."""
        names = [f"{self._prefix}{name}" for name in self._decoder.state_dict()]
        own = [name.removeprefix(self._prefix) for name in names if not name.startswith(self._layers_prefix)]
        return self._loaded(self._decoder, self._prefix, own)

    def layer_prefix(self, index: int) -> str:
        """What the names of a layer's tensors begin with in a checkpoint."""
        return f"{self._layers_prefix}{index}."

    def around(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, as stored, of all that the checkpoint holds beside the layers."""
        for name in self._files:
            if not name.startswith(self._layers_prefix):
                yield name, self._read(name)

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str, names: list[str]) -> Iterator[Any]:
        empty = {name: module.state_dict()[name] for name in names}
        self._assign(module, {name: self._read(f"{prefix}{name}").to(self.device, torch.float32) for name in names})
        try:
            yield module
        finally:
            self._assign(module, empty)

    @staticmethod
    def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise LegolmError(f"model: the checkpoint has no tensor {name}; {SAVE_AGAIN}")
        file, own = self._files[name]
        with open_tensors(file, "model: ", SAVE_AGAIN) as handle:
            tensor: Tensor = handle.get_tensor(own)
        check_finite(name, tensor, file)
        return tensor


class CheckpointWriter:
    """Writes tensors in one dtype as safetensors shards, in the layout that `from_pretrained` reads."""

    def __init__(self, folder: Path, dtype: torch.dtype, shard_bytes: int | None = None) -> None:
        self._folder, self._dtype, self._shard_bytes = folder, dtype, shard_bytes or SHARD_BYTES
        self._waiting: dict[str, Tensor] = {}
        self._shard_of: dict[str, int] = {}
        self._shards = self._bytes = 0

    def add(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors, their names behind `prefix`."""
        self._waiting |= {prefix + name: tensor.to(CPU, self._dtype).contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= self._shard_bytes:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the index if there is more than one shard."""
        self._flush()
        if self._shards == 1:
            self._path(1).rename(self._folder / "model.safetensors")
            return
        final = {}
        for shard in range(1, self._shards + 1):
            final[shard] = f"model-{shard:05d}-of-{self._shards:05d}.safetensors"
            self._path(shard).rename(self._folder / final[shard])
        index = {
            "metadata": {"total_size": self._bytes},
            "weight_map": {name: final[shard] for name, shard in self._shard_of.items()},
        }
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._shards += 1
        self._shard_of |= dict.fromkeys(self._waiting, self._shards)
        self._bytes += sum(tensor.nbytes for tensor in self._waiting.values())
        save_file(self._waiting, self._path(self._shards), metadata={"format": "pt"})
        self._waiting = {}

    def _path(self, shard: int) -> Path:
        return self._folder / f".shard-{shard}.safetensors"
