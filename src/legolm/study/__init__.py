"""Experiments over runs: compare schemes, leave one out. Numbers only."""

from legolm.study.compare import check_places, compare, plans
from legolm.study.leave_one_out import ablate

__all__ = ["ablate", "check_places", "compare", "plans"]
