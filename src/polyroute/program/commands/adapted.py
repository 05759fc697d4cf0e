"""Results of adaptations: the files they are gathered from, and the tables they are shown in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.data.metrics import mean_and_error
from polyroute.errors import InputError
from polyroute.host.files import read_json, read_tensors, write_json
from polyroute.host.processes import index, is_first, wait
from polyroute.saved.manifest import check_manifest
from polyroute.saved.peft_export import CONFIG, TENSORS

__all__ = [
    "ROUTE",
    "ResultFiles",
    "check_adapter",
    "line_of",
    "number",
    "place_of",
    "read_results",
    "tables_of",
]

RESULT: Mapping[str, Any] = {
    "task": str, "seed": int, "label": str, "metric": str, "score": float | int | None,
    "trained_parameters": int, "seconds": float | int,
}  # fmt: skip
"""Keys that every result has, and the types of their values."""
ROUTE = "route.safetensors"
"""The logits of a slot, beside its adapter; there are none where the phase has no routes."""
COLUMNS = (
    "task", "metric", "score", "standard error", "per token", "seeds", "parameters", "seconds",
)  # fmt: skip


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
            read = [r for file in (self.path, *parts) if file.exists() for r in read_results(file)]
            # A kill may have left parts that the file has already.
            found = list({(r["task"], r["label"], r["seed"]): r for r in read}.values())
            if found or parts:
                place = {slot: i for i, slot in enumerate(self.order)}
                found.sort(key=lambda r: place.get((r["task"], r["label"], r["seed"]), len(place)))
                write_json(self.path, found)
            for file in parts:
                file.unlink()
        wait()
        return read_results(self.path) if self.path.exists() else []


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the results of adaptations.

    Raises:
        InputError: the file is damaged.
    """
    results = read_json(path)
    if not isinstance(results, list) or not all(map(_is_result, results)):
        raise InputError(f"{path} is damaged: it is not a list of results; delete it to start over")
    if len({(r["task"], r["label"], r["seed"]) for r in results}) < len(results):
        raise InputError(f"{path} is damaged: it has a result twice; delete it to start over")
    return results


def _is_result(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() >= RESULT.keys()
        and all(
            isinstance(value.get(name), kind) and not isinstance(value.get(name), bool)
            for name, kind in RESULT.items()
        )
        and isinstance(value.get("score_normalised"), float | int | None)
    )


def place_of(folder: Path, result: Mapping[str, Any]) -> Path:
    """The folder of the adapter of a result, in the folder of its run."""
    return Path(folder, result["task"], f"seed-{result['seed']}", result["label"])


def check_adapter(place: Path) -> None:
    """Read the files of an adapter, and compare them with its manifest if it has one.

    Raises:
        InputError: a file is missing or damaged.
    """
    fields = read_json(place / CONFIG)
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise InputError(f"{place / CONFIG} is damaged: it does not say what the adapter is")
    read_tensors(place / TENSORS)
    if (place / ROUTE).exists():
        read_tensors(place / ROUTE)
    check_manifest(place)


def line_of(result: Mapping[str, Any]) -> str:
    """One adaptation that ended, in words."""
    label = f" {result['label']}" if result["label"] else ""
    who = f"{result['task']} with seed {result['seed']}{label}"
    if result["score"] is None:
        return f"{who}: diverged at step {result['diverged_at']}"
    by_token = number(result["score_normalised"])
    return (
        f"{who}: {result['metric']} {number(result['score'])}"
        f"{by_token and f', {by_token} per token'}; {result['seconds']:.1f} s of training"
    )


def tables_of(
    results: Sequence[Mapping[str, Any]], tasks: Sequence[str], labels: Iterable[str]
) -> tuple[list[Table], list[dict[str, Any]]]:
    """A table for each setting, and the mean over tasks of each."""
    tables, means = [], []
    for label in labels:
        table = Table(*COLUMNS, title=escape(label) or None)
        scores: list[float] = []
        by_token: list[float | None] = []
        for task in tasks:
            rows = [r for r in results if r["task"] == task and r["label"] == label]
            rows = [r for r in rows if r["score"] is not None]
            if not rows:
                table.add_row(escape(task), "", "diverged")
                continue
            score, normalised = _add_row(table, task, rows)
            scores.append(score)
            by_token.append(normalised)
        if scores:
            mean, error = mean_and_error(scores)
            normalised = _mean(by_token)
            means.append(
                {"label": label, "score": mean, "standard_error": error,
                 "score_normalised": normalised}
            )  # fmt: skip
            table.add_row("mean over tasks", "", number(mean), number(error), number(normalised))
        tables.append(table)
    return tables, means


def _add_row(
    table: Table, task: str, rows: Sequence[Mapping[str, Any]]
) -> tuple[float, float | None]:
    """Add a task to a table in place; the means of its two scores over seeds."""
    mean, error = mean_and_error([r["score"] for r in rows])
    normalised = _mean([r.get("score_normalised") for r in rows])  # missing in old results
    seconds, _ = mean_and_error([r["seconds"] for r in rows])
    table.add_row(
        escape(task), rows[0]["metric"], number(mean), number(error), number(normalised),
        str(len(rows)), f"{rows[0]['trained_parameters']:,}", f"{seconds:.1f}",
    )  # fmt: skip
    return mean, normalised


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of scores; None where one of them has no such score, as that of free text."""
    known = [value for value in values if value is not None]
    return mean_and_error(known)[0] if known and len(known) == len(values) else None


def number(value: float | None) -> str:
    """A score as tables show it; nothing where there is none."""
    return "" if value is None else f"{value:.3f}"
