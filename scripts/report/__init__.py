"""``fewstep report``: one self-contained HTML page from any set of run folders."""

from scripts.report.command import build_report, main

__all__ = ["build_report", "main"]
