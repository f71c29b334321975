"""Cut blocks from the LLM: calibrate, choose a shape, prune, recover, write."""

from legolm.prune.build import cut_blocks, kept_block, recipe_of
from legolm.prune.calibrate import first_readers
from legolm.prune.cuts import clients_needs, clients_sketch, needs_of
from legolm.prune.moments import Moments, Needs
from legolm.prune.recover import check_recovery
from legolm.prune.registry import Criterion, Pattern, criterion, criterion_of
from legolm.prune.statistics import (
    Statistics,
    check_statistics,
    collect,
    collected,
    flat,
    flat_size,
    load_statistics,
    save_statistics,
    sent_bytes,
    sketched,
)
from legolm.prune.target import planned_coverage, target_pattern

__all__ = [
    "Criterion",
    "Moments",
    "Needs",
    "Pattern",
    "Statistics",
    "check_recovery",
    "check_statistics",
    "clients_needs",
    "clients_sketch",
    "collect",
    "collected",
    "criterion",
    "criterion_of",
    "cut_blocks",
    "first_readers",
    "flat",
    "flat_size",
    "kept_block",
    "load_statistics",
    "needs_of",
    "planned_coverage",
    "recipe_of",
    "save_statistics",
    "sent_bytes",
    "sketched",
    "target_pattern",
]
