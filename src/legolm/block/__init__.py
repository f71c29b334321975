"""Blocks: what each holds of the LLM, and how it lies on disk."""

from legolm.block.base import Base, decoder_weights
from legolm.block.block import Block
from legolm.block.coverage import Coverage, add_matrix, load_coverage, pack_mask, slice_matrix, unpack_mask
from legolm.block.drawing import picture
from legolm.block.manifest import (
    Manifest,
    hide_places,
    llm_block,
    read_block,
    rename_block,
    without_places,
    write_block,
    write_llm,
)

__all__ = [
    "Base",
    "Block",
    "Coverage",
    "Manifest",
    "add_matrix",
    "decoder_weights",
    "hide_places",
    "llm_block",
    "load_coverage",
    "pack_mask",
    "picture",
    "read_block",
    "rename_block",
    "slice_matrix",
    "unpack_mask",
    "without_places",
    "write_block",
    "write_llm",
]
