"""Results of adaptations: the files they are gathered from, and the tables they are shown in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.data.metrics import mean_and_error
from polyroute.errors import InputError
from polyroute.host.files import read_json, write_json
from polyroute.host.processes import index, is_first, wait

__all__ = ["ResultFiles", "number", "tables_of"]

RESULT = {"task", "seed", "label", "metric", "score", "trained_parameters", "seconds"}
"""Keys that every result has."""
COLUMNS = ("task", "metric", "score", "standard error", "seeds", "parameters", "seconds")


@dataclass(frozen=True)
class ResultFiles:
    """Where processes that adapt a share each write their results."""

    path: Path
    """All results, once they are gathered."""
    running: Path
    """The folder of adaptations that are not finished."""
    order: Sequence[tuple[str, str, int]]
    """Task, label and seed of each result, as they are to be sorted."""

    @property
    def own(self) -> Path:
        """The results file of this process; the first process also keeps the earlier results."""
        return self.path if is_first() else self.running / f"results-{index()}.json"

    def gather(self) -> list[dict[str, Any]]:
        """Collect the results of all processes in one file, in order.

        Raises:
            InputError: a file is damaged.
        """
        wait()
        if is_first():
            parts = sorted(self.running.glob("results-*.json"))
            found = [r for file in (self.path, *parts) if file.exists() for r in _read(file)]
            if found or parts:
                place = {slot: i for i, slot in enumerate(self.order)}
                found.sort(key=lambda r: place.get((r["task"], r["label"], r["seed"]), len(place)))
                write_json(self.path, found)
            for file in parts:
                file.unlink()
        wait()
        return _read(self.path) if self.path.exists() else []


def _read(path: Path) -> list[dict[str, Any]]:
    results = read_json(path)
    if not isinstance(results, list) or not all(
        isinstance(r, dict) and r.keys() >= RESULT for r in results
    ):
        raise InputError(f"{path} is damaged: it is not a list of results; delete it to start over")
    return results


def tables_of(
    results: Sequence[Mapping[str, Any]], tasks: Sequence[str], labels: Iterable[str]
) -> tuple[list[Table], list[dict[str, Any]]]:
    """A table for each setting, and the mean over tasks of each."""
    tables, means = [], []
    for label in labels:
        table = Table(*COLUMNS, title=escape(label) or None)
        scores = []
        for task in tasks:
            rows = [r for r in results if r["task"] == task and r["label"] == label]
            rows = [r for r in rows if r["score"] is not None]
            if not rows:
                table.add_row(escape(task), "", "diverged")
                continue
            scores.append(_add_row(table, task, rows))
        if scores:
            mean, error = mean_and_error(scores)
            means.append({"label": label, "score": mean, "standard_error": error})
            table.add_row("mean over tasks", "", number(mean), number(error))
        tables.append(table)
    return tables, means


def _add_row(table: Table, task: str, rows: Sequence[Mapping[str, Any]]) -> float:
    """Add a task to a table in place; its mean over seeds."""
    mean, error = mean_and_error([r["score"] for r in rows])
    seconds, _ = mean_and_error([r["seconds"] for r in rows])
    table.add_row(
        escape(task), rows[0]["metric"], number(mean), number(error), str(len(rows)),
        f"{rows[0]['trained_parameters']:,}", f"{seconds:.1f}",
    )  # fmt: skip
    return mean


def number(value: float | None) -> str:
    """A score as tables show it; nothing where there is none."""
    return "" if value is None else f"{value:.3f}"
