"""Experiments over runs: compare schemes, leave one out. Numbers only."""

from legolm.study.compare import compare, plans, print_comparison
from legolm.study.leave_one_out import ablate, print_ablation

__all__ = ["ablate", "compare", "plans", "print_ablation", "print_comparison"]
