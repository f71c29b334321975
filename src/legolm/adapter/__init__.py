"""LoRA adapters: keys, slices, start, flat form, files, merging, and what a client learned."""

from legolm.adapter.change import Change
from legolm.adapter.files import (
    CONFIG,
    FACTORS,
    WEIGHTS,
    adapter_config,
    load_adapter,
    load_factors,
    read_adapter,
    save_adapter,
    save_factors,
    weights_file,
)
from legolm.adapter.flat import Flat, Layout, adapter_layout, check_finite
from legolm.adapter.keys import (
    Tensors,
    adapter_keys,
    adapter_parameters,
    check_factors,
    factor_key,
    factor_shape,
    is_frozen,
    is_whitened,
    modules_of,
    parse_key,
    under_prefix,
    with_prefix,
)
from legolm.adapter.merge import linears, masked_, merge, merged, merged_weight
from legolm.adapter.slices import concatenated, mixed, slice_factors, tensors_hash
from legolm.adapter.start import init_factors, initial_factors

__all__ = [
    "CONFIG",
    "FACTORS",
    "WEIGHTS",
    "Change",
    "Flat",
    "Layout",
    "Tensors",
    "adapter_config",
    "adapter_keys",
    "adapter_layout",
    "adapter_parameters",
    "check_factors",
    "check_finite",
    "concatenated",
    "factor_key",
    "factor_shape",
    "init_factors",
    "initial_factors",
    "is_frozen",
    "is_whitened",
    "linears",
    "load_adapter",
    "load_factors",
    "masked_",
    "merge",
    "merged",
    "merged_weight",
    "mixed",
    "modules_of",
    "parse_key",
    "read_adapter",
    "save_adapter",
    "save_factors",
    "slice_factors",
    "tensors_hash",
    "under_prefix",
    "weights_file",
    "with_prefix",
]
