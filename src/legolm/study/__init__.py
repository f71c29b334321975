"""Experiments over runs: compare schemes, leave one out. Numbers only."""

from legolm.study.compare import compare, plans
from legolm.study.leave_one_out import ablate

__all__ = ["ablate", "compare", "plans"]
