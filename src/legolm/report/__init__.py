"""The report of a run: one self-contained HTML page with the paper's figure 3, tables and costs."""

from legolm.report.html import Raw, tag, write_report
from legolm.report.plots import need_matplotlib
from legolm.report.summary import summarize
from legolm.report.terminal import (
    print_blocks,
    print_composition,
    print_coverage,
    print_plan,
    print_scores,
    print_summary,
    wide_enough,
)

__all__ = [
    "Raw",
    "need_matplotlib",
    "print_blocks",
    "print_composition",
    "print_coverage",
    "print_plan",
    "print_scores",
    "print_summary",
    "summarize",
    "tag",
    "wide_enough",
    "write_report",
]
