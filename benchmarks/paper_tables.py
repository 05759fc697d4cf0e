"""Tables of `paper.py`, made from its raw results alone: the same results give the same text."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyroute.study.intervals import estimates

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over tasks with the 95% interval of a bootstrap over tasks."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """As a difference."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def read(folder: Path, stage: str) -> Any:
    """The raw results of a stage, None where it did not run."""
    path = folder / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def results_of(folder: Path, stages: Iterable[str]) -> list[dict[str, Any]]:
    """The raw results of some stages, one after the other; a stage that did not run has none."""
    return [result for stage in stages for result in read(folder, stage) or ()]


def by_task(results: Iterable[Result]) -> dict[str, float]:
    """The mean score of each task over its seeds; what diverged counts as 0."""
    scores: dict[str, list[float]] = {}
    for result in results:
        scores.setdefault(result["task"], []).append(result["score"] or 0.0)
    return {task: statistics.fmean(values) for task, values in scores.items()}


def interval(values: Sequence[float]) -> Interval:
    """Mean and bootstrap interval of one number for each task."""
    found = estimates(np.array(values)[:, None])[0]
    low, high = (found.mean if edge is None else edge for edge in (found.low, found.high))
    return Interval(found.mean, low, high)


def difference(ours: Iterable[Result], theirs: Iterable[Result]) -> Interval:
    """Mean paired difference over the tasks, and the seeds of each, that both have.

    Results without a seed, of what is not adapted, are compared with all seeds.
    """
    ours, theirs = list(ours), list(theirs)
    if all("seed" in result for result in (*ours, *theirs)):
        common = {(r["task"], r["seed"]) for r in ours} & {(r["task"], r["seed"]) for r in theirs}
        ours = [r for r in ours if (r["task"], r["seed"]) in common]
        theirs = [r for r in theirs if (r["task"], r["seed"]) in common]
    one, other = by_task(ours), by_task(theirs)
    tasks = [task for task in one if task in other]
    return interval([one[task] - other[task] for task in tasks])


def rows(text: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = text
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def method_table(
    entries: Sequence[tuple[str, str, Sequence[Result]]], reference: Sequence[Result]
) -> str:
    """Methods by accuracy, difference to a reference, trained numbers and time.

    Args:
        entries: a name, a phase, and the results of each.
        reference: the results of what all are compared with.
    """
    head = "method, phase, accuracy, minus reference, trained for a task, seconds, seeds"
    text = [head.split(", ")]
    for name, phase, results in entries:
        if not results:
            continue
        score = interval(list(by_task(results).values()))
        gap = "" if results is reference else difference(results, reference).signed
        trained = results[0].get("trained_parameters", 0)
        seconds = [r["seconds"] for r in results if r.get("seconds") is not None]
        text.append(
            [
                name, phase, str(score), gap, f"{trained:,}",
                f"{statistics.median(seconds):.1f}" if seconds else "",
                str(len({r["seed"] for r in results})) if "seed" in results[0] else "",
            ]
        )  # fmt: skip
    return rows(text)
