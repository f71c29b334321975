"""Where layers, heads and MLPs live in each model family; finding, loading, saving and fingerprinting models."""

from legolm.models.family import FAMILIES, Family, Module, Shape, decoder_layers, family_of, shape_of
from legolm.models.layered import CheckpointWriter, LayeredModel
from legolm.models.load import (
    find_fingerprint,
    fingerprint,
    lasting_name,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    save_model,
)

__all__ = [
    "FAMILIES",
    "CheckpointWriter",
    "Family",
    "LayeredModel",
    "Module",
    "Shape",
    "decoder_layers",
    "family_of",
    "find_fingerprint",
    "fingerprint",
    "lasting_name",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve",
    "save_model",
    "shape_of",
]
