"""Where layers, heads and MLPs live in each model family; finding, loading, saving and fingerprinting models."""

from legolm.models.beside import carry
from legolm.models.calls import Call, recorded
from legolm.models.checkpoint import is_gguf, load_config, place_weights
from legolm.models.continuing import continued
from legolm.models.cut import config_changes, narrow, tell
from legolm.models.family import FAMILIES, LLAMA, Family, Module, Shape, Unit, decoder_layers, family_of, shape_of
from legolm.models.finite import finite
from legolm.models.head import CHUNK, Head, answer_losses, divergences, judged
from legolm.models.importing import import_model
from legolm.models.layered import CheckpointWriter, LayeredModel
from legolm.models.layout import Layout, layout_of
from legolm.models.lean import hidden_states, lean
from legolm.models.load import (
    check_weights,
    copy_checkpoint,
    copy_side_files,
    count_parameters,
    find_fingerprint,
    find_model,
    fingerprint,
    folder_bytes,
    lasting_name,
    load_model,
    load_tokenizer,
    read_weights,
    resolve,
    save_model,
)
from legolm.models.packing import LONG, pack, shared_prompt
from legolm.models.precision import (
    autocast,
    choose_device,
    choose_precision,
    dtype_of,
    free_bytes,
    product_speed,
)
from legolm.models.rotary import scales_by_length
from legolm.models.rounding import rounded
from legolm.models.splits import DIGIT, GPT2, SPLITS
from legolm.models.writing import written

__all__ = [
    "CHUNK",
    "DIGIT",
    "FAMILIES",
    "GPT2",
    "INDEX",
    "LLAMA",
    "LONG",
    "SPLITS",
    "Call",
    "CheckpointWriter",
    "Family",
    "Head",
    "LayeredModel",
    "Layout",
    "Module",
    "Shape",
    "Unit",
    "answer_losses",
    "autocast",
    "carry",
    "check_weights",
    "choose_device",
    "choose_precision",
    "config_changes",
    "continued",
    "copy_checkpoint",
    "copy_side_files",
    "count_parameters",
    "decoder_layers",
    "divergences",
    "dtype_of",
    "family_of",
    "find_fingerprint",
    "find_model",
    "fingerprint",
    "finite",
    "folder_bytes",
    "free_bytes",
    "hidden_states",
    "import_model",
    "is_gguf",
    "judged",
    "lasting_name",
    "layout_of",
    "lean",
    "load_config",
    "load_model",
    "load_tokenizer",
    "narrow",
    "pack",
    "place_weights",
    "product_speed",
    "read_weights",
    "recorded",
    "resolve",
    "rounded",
    "save_model",
    "scales_by_length",
    "shape_of",
    "shared_prompt",
    "tell",
    "written",
]
