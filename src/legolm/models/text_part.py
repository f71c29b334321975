"""The text model inside a multimodal checkpoint, as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from legolm.errors import LegolmError, brief
from legolm.models.checkpoint import FLOATS, SAVE_AGAIN, drop_code, main_dtype, read_config, stored_weights
from legolm.models.family import shape_of
from legolm.models.layered import CheckpointWriter
from legolm.models.layout import check_dense, empty_model
from legolm.system import open_tensors

INSIDE = "language_model."
"""What names the text model in the tensors of a multimodal one."""


def write_text_part(path: Path, folder: Path) -> None:
    """Write config and weights of the text part of the checkpoint at `path` into `folder`, in the dtype stored.

    One tensor is in memory at a time, and a shard. Raises `LegolmError` for a checkpoint without a text part, and for
    one whose text part is no dense decoder or lacks a tensor.
    """
    whole = read_config(path)
    config = getattr(whole, "text_config", None)
    if config is None or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LegolmError(f"model: {path}: {whole.model_type!r} has no text model of its own inside; give a causal LM")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", config.tie_word_embeddings)
    model = empty_model(config)
    check_dense(model)
    shape_of(config)
    wanted, stored = set(model.state_dict()), stored_weights(path)
    found = {name.replace(INSIDE, "", 1): name for name in stored}
    lacking = sorted(wanted - found.keys() - set(getattr(model, "all_tied_weights_keys", None) or ()))
    if lacking:
        raise LegolmError(f"model: {path}: its text part lacks {brief(lacking[0])}; {SAVE_AGAIN}")
    names = sorted(wanted & found.keys())
    for name in names:
        if stored[found[name]][1].dtype not in FLOATS:
            raise LegolmError(f"model: {path}: {found[name]} is {stored[found[name]][1].dtype}; {SAVE_AGAIN}")
    config.dtype = main_dtype(stored[found[name]][1] for name in names)
    writer = CheckpointWriter(folder, config.dtype)
    for name in names:
        with open_tensors(stored[found[name]][0], "model: ", SAVE_AGAIN) as handle:
            writer.add("", {name: handle.get_tensor(found[name])})
    writer.close()
    drop_code(config)
    config.save_pretrained(folder)
