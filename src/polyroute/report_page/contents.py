"""The contents of a report, collected from the folders of runs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyroute.report_page.alignment import alignment_charts
from polyroute.report_page.charts import Chart, coming_apart, learning, parameters, shots
from polyroute.report_page.data import Run, read_runs
from polyroute.report_page.routing import MOST_NUMBERS, Routing, categories_of, routing_of
from polyroute.report_page.summary import Reference, ResultRow, groups, references, summarise

__all__ = ["Contents", "collect"]


@dataclass(frozen=True)
class Contents:
    """Everything that a report shows."""

    runs: Sequence[Run]
    rows: Sequence[ResultRow]
    references: Sequence[Reference]
    """What the rows can be compared with; the page opens with the first."""
    categories: Mapping[str, str]
    charts: Sequence[Chart]
    routing: Sequence[Routing]
    notes: Sequence[str]
    """One sentence for each part that was left out."""


def collect(
    folders: Sequence[str | os.PathLike[str]],
    data: str | None = None,
    reader: Mapping[str, Any] | None = None,
) -> Contents:
    """Read runs and compute the contents of a report.

    Args:
        folders: folders of `polyroute train`, `import`, `adapt` or `demo`.
        data: a suite with the categories of tasks; by default the suites of the runs.
        reader: options of its reader.

    Raises:
        InputError: a folder holds no run, or there is no suite.
    """
    runs, notes = read_runs(folders)
    categories = categories_of(runs, data, notes, reader)
    grouped = groups(runs)
    colours = {name: i for i, name in enumerate(grouped)}
    colours |= {run.name: colours[name] for name, members in grouped.items() for run in members}
    rows = summarise(grouped)
    charts = [
        learning(runs, colours),
        *coming_apart(runs, colours),
        shots(rows, colours),
        parameters(rows, colours),
        *alignment_charts(runs, colours, notes),
    ]
    limit = MOST_NUMBERS // max(1, sum(run.inventory is not None for run in runs))
    routing = [routing_of(run, categories, limit, notes) for run in runs]
    return Contents(
        runs,
        rows,
        references(rows, grouped),
        categories,
        [chart for chart in charts if chart is not None],
        [each for each in routing if each is not None],
        notes,
    )
