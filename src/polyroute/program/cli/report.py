"""`polyroute report`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import ReportOptions

__all__ = ["report"]


@command(ReportOptions)
def report(options: ReportOptions) -> Result:
    """Show what runs came to on one HTML page: tables, curves, alignment, and how tasks are routed.

    The page needs no network. Its figures (PNG, SVG) and numbers (CSV) go to a folder beside it. A
    run of train brings the adaptations and scores in its folder. Runs that differ by their seed
    alone are one line of the table.

    Example: `polyroute report runs/shared runs/poly runs/mhr --out report.html`
    """
    from polyroute.report_page import write_report

    out = options.out
    beside = write_report(options.runs, out, data=options.data, reader=options.reader)
    return Result(
        {"out": out, "files": beside},
        (f"the report is {out}; its figures and numbers are in {beside}",),
    )
