"""A run, or several side by side, as one HTML page that needs no network: ``pgl report``."""

from __future__ import annotations

from pgl.report.page import REPORT, report_line, write_report

__all__ = ["REPORT", "report_line", "write_report"]
