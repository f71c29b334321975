"""Cut blocks from the LLM: calibrate, choose a shape, prune, recover, write."""

from legolm.prune.build import cut_blocks
from legolm.prune.registry import Criterion, Pattern, criterion
from legolm.prune.statistics import collect, save_statistics
from legolm.prune.target import planned_coverage, target_pattern

__all__ = [
    "Criterion",
    "Pattern",
    "collect",
    "criterion",
    "cut_blocks",
    "planned_coverage",
    "save_statistics",
    "target_pattern",
]
