"""What people read of runs and studies: pages, tables for the terminal, plots."""

from legolm.report.ablation import print_ablation, write_ablation
from legolm.report.compare import print_comparison, write_comparison
from legolm.report.plots import draw, need_matplotlib
from legolm.report.run import write_report
from legolm.report.status import read_status, show_status
from legolm.report.summary import summarize
from legolm.report.terminal import (
    print_blocks,
    print_composition,
    print_coverage,
    print_evaluation,
    print_plan,
    print_speeds,
    print_summary,
)
from legolm.report.trackers import Trackers
from legolm.report.tradeoff import draw_tradeoff, print_picked

__all__ = [
    "Trackers",
    "draw",
    "draw_tradeoff",
    "need_matplotlib",
    "print_ablation",
    "print_blocks",
    "print_comparison",
    "print_composition",
    "print_coverage",
    "print_evaluation",
    "print_picked",
    "print_plan",
    "print_speeds",
    "print_summary",
    "read_status",
    "show_status",
    "summarize",
    "write_ablation",
    "write_comparison",
    "write_report",
]
