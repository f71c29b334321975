"""Blocks whose units are chosen by their place, without calibration: the slices of HeteroFL and FedRolex.

HeteroFL (Diao et al., ICLR 2021, arXiv 2010.01264) gives a client the first units of each layer, FedRolex (Alam et al.,
NeurIPS 2022, arXiv 2212.01548) a window that begins one unit further in each round and goes on at the front when it
reaches the end. Both cut the hidden size, too; blocks here never do. No weight that stays is changed.
"""

from __future__ import annotations

import copy

from torch import nn

from legolm.block import Coverage, slice_matrix
from legolm.models import narrow
from legolm.prune.calibrate import Stream


class WindowCut:
    """The block of this coverage: slices of the LLM's weights as they are."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage

    def step(self, index: int, layer: nn.Module, dense: Stream | None) -> nn.Module | None:
        """The layer's slice; nothing of a layer that is not kept."""
        if index not in self.coverage.layers:
            return None
        own = copy.deepcopy(layer)
        for name in self.coverage.shape.modules:
            module = own.get_submodule(name)
            assert isinstance(module, nn.Linear)
            narrow(
                module, slice_matrix(self.coverage, index, name, module.weight.data), self.coverage.rows(index, name)
            )
        return own
