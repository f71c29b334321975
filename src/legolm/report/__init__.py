"""The report of a run: one self-contained HTML page with the paper's figure 3, tables and costs."""

from legolm.report.html import write_report

__all__ = ["write_report"]
