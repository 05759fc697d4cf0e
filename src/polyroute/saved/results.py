"""The results in the folder of a run, as its model card shows them."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.host.files import read_json
from polyroute.saved.hub import P3, public
from polyroute.saved.markdown import Rows, cell, code, number, table
from polyroute.saved.runs import read_run

__all__ = ["ScoreTable", "read_results"]


@dataclass(frozen=True)
class ScoreTable:
    """One table of results, in which each task has one row."""

    title: str
    how: str
    """How the scores were computed, as sentences."""
    suite: str
    split: str
    columns: tuple[str, ...]
    rows: Rows
    scores: Mapping[str, list[float]]
    """By metric, the scores of its tasks."""

    def section(self) -> str:
        """The section of the card: the mean of each metric, then every task."""
        means = [
            (metric, number(statistics.fmean(values)), number(_error(values)), len(values))
            for metric, values in self.scores.items()
        ]
        where = " of ".join(filter(None, (f"split {code(self.split)}", cell(self.suite))))
        columns = ("metric", "mean", "standard error over tasks", "tasks")
        return "\n\n".join(
            (
                f"## Results: {cell(self.title)}",
                f"Measured on {where}. {self.how}".strip(),
                table(columns, means),
                table(self.columns, self.rows),
            )
        )


def read_results(run: Path) -> list[ScoreTable]:
    """The evaluations and adaptations in the folder of a run.

    Raises:
        InputError: a file of results is damaged.
    """
    return [*_evaluations(run), *_adaptations(run)]


def _evaluations(run: Path) -> Iterator[ScoreTable]:
    for file in sorted(run.glob("evaluate-*.json")):
        with _naming(file):
            yield _evaluation(read_json(file))


def _evaluation(found: Mapping[str, Any]) -> ScoreTable:
    rows = found["tasks"]
    return ScoreTable(
        "zero-shot, by the average of the skills" if found["zero_shot"] else "tasks of training",
        "",
        _suite_name(found["data"]),
        found["split"],
        ("task", "metric", "score", "majority", "chance", "examples"),
        [
            (code(r["task"]), r["metric"], number(r["score"]), number(r["majority"]),
             number(r["chance"]), r["num_examples"])
            for r in rows
        ],
        _by_metric((r["metric"], r["score"]) for r in rows),
    )  # fmt: skip


def _adaptations(run: Path) -> Iterator[ScoreTable]:
    for file in sorted(run.glob("*/results.json")):
        described = file.parent / "run.json"
        with _naming(file):
            results = [r for r in read_json(file) if r["score"] is not None]
            config = read_run(file.parent)["config"] if described.is_file() else {}
            for label in dict.fromkeys(r["label"] for r in results):
                yield _adaptation([r for r in results if r["label"] == label], label, config)


def _adaptation(
    results: Sequence[Mapping[str, Any]], label: str, config: Mapping[str, Any]
) -> ScoreTable:
    first = results[0]
    by_task: dict[str, list[float]] = {}
    for r in results:
        by_task.setdefault(r["task"], []).append(r["score"])
    metric = {r["task"]: r["metric"] for r in results}
    chosen = "; steps were chosen by the test score" if first["chosen_by"] == "test_score" else ""
    title = f"adapted in phase {first['phase']}, {first['shots']} examples a task"
    return ScoreTable(
        f"{title}, {label}" if label else title,
        f"Each score is a mean over seeds; each seed draws its own examples{chosen}.",
        _suite_name(config.get("data")),
        first["split"],
        ("task", "metric", "score", "standard error over seeds", "seeds"),
        [
            (code(task), metric[task], number(statistics.fmean(scores)),
             number(_error(scores)), len(scores))
            for task, scores in by_task.items()
        ],
        _by_metric((metric[task], statistics.fmean(s)) for task, s in by_task.items()),
    )  # fmt: skip


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Within the block, an entry that is missing or malformed is an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: delete it to leave it out of the card") from error


def _suite_name(data: object) -> str:
    """What the card calls a suite: the last part of its path, without the folders above it."""
    return P3 if data == P3 else str(public(data or "")).rpartition("/")[2]


def _by_metric(scores: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for metric, score in scores:
        found.setdefault(metric, []).append(score)
    return found


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value, from which it cannot be estimated."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
