"""The files beside a page: each figure as PNG and SVG, all numbers as CSV."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polyroute.host.printable import spreadsheet_cell
from polyroute.report_page.contents import Contents
from polyroute.report_page.figures import draw_chart, draw_routing
from polyroute.report_page.summary import Reference

__all__ = ["write_files"]


def write_files(report: Contents, folder: Path) -> None:
    """Write the figures and the numbers of a report into an existing folder."""
    first = report.references[0] if report.references else Reference("", [], [])
    _write_csv(
        folder / "results.csv",
        ("run", "method", "stage", "phase", "shots", "setting", "split", "metric", "tasks", "seeds",
         "mean", "low", "high", "difference", "difference_low", "difference_high",
         "compared_with", "trained_parameters", "seconds"),
        (
            (row.run, row.method, row.stage, row.phase, row.shots, row.setting, row.split,
             row.metric, row.estimate.tasks, row.repeats, *row.estimate[:3],
             *(difference[:3] if difference else (None,) * 3),
             "" if other is None else report.rows[other].name, row.parameters, row.seconds)
            for row, other, difference in zip(
                report.rows, first.others, first.differences, strict=True
            )
        ),
    )  # fmt: skip
    tasks = sorted({task for row in report.rows for task in row.scores})
    _write_csv(
        folder / "tasks.csv",
        ("task", "category", *(row.name for row in report.rows)),
        (
            (task, report.categories.get(task, ""), *(r.scores.get(task) for r in report.rows))
            for task in tasks
        ),
    )
    for chart in report.charts:
        draw_chart(folder / chart.key, chart)
        _write_csv(
            folder / f"{chart.key}.csv",
            ("series", chart.x, chart.y, "low", "high", "label"),
            ((series.name, *point) for series in chart.series if series.name
             for point in series.points),
        )  # fmt: skip
    for i, routing in enumerate(report.routing, 1):
        name = re.sub(r"[^\w.-]+", "-", routing.run)[:60]
        draw_routing(folder / f"routing-{i}-{name}", routing)
        categories = routing.categories or [""] * len(routing.tasks)
        weights = routing.weights.mean((1, 2)).tolist()
        _write_csv(
            folder / f"routing-{i}-{name}.csv",
            ("task", "category", "x", "y", *(f"skill {k + 1}" for k in range(len(weights[0])))),
            (
                (task, category, *place, *shares)
                for task, category, place, shares in zip(
                    routing.tasks, categories, routing.places.tolist(), weights, strict=True
                )
            ),
        )


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([spreadsheet_cell(value) for value in row] for row in (header, *rows))
