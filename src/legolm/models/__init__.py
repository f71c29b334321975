"""Where layers, heads and MLPs live in each model family; finding, loading, saving and fingerprinting models."""

from legolm.models.family import MIDDLE, MODULES, Module, Shape, decoder_layers, shape_of
from legolm.models.load import fingerprint, load_config, load_model, load_tokenizer, resolve, save_model

__all__ = [
    "MIDDLE",
    "MODULES",
    "Module",
    "Shape",
    "decoder_layers",
    "fingerprint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve",
    "save_model",
    "shape_of",
]
