"""The report of a run: one self-contained HTML page with the paper's figure 3, tables and costs."""

from legolm.report.html import write_report
from legolm.report.plots import need_matplotlib

__all__ = ["need_matplotlib", "write_report"]
