"""Which coordinates of the LLM a block holds, and moving adapters between a block's slice and the LLM."""

from legolm.coverage.maps import Coverage, load_coverage, pack_mask, save_coverage, unpack_mask
from legolm.coverage.slicing import (
    add_matrix,
    add_slice,
    factor_key,
    factor_shape,
    init_factors,
    modules_of,
    parse_key,
    slice_factors,
    slice_matrix,
    tensors_hash,
)

__all__ = [
    "Coverage",
    "add_matrix",
    "add_slice",
    "factor_key",
    "factor_shape",
    "init_factors",
    "load_coverage",
    "modules_of",
    "pack_mask",
    "parse_key",
    "save_coverage",
    "slice_factors",
    "slice_matrix",
    "tensors_hash",
    "unpack_mask",
]
