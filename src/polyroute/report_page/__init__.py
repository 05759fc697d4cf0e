"""A page with the results of runs: tables, curves, alignment and routing."""

from polyroute.report_page.write import write_report

__all__ = ["write_report"]
