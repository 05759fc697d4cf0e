"""The results table: one row for each way of learning tasks, and all paired differences."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyroute.report_page.data import Result, Run
from polyroute.study.intervals import Estimate, estimates

__all__ = ["Reference", "ResultRow", "groups", "references", "summarise"]

PHASES = ("full", "mu", "mu-uncollapsed", "z", "random")
"""The order of phases in the table."""
STAGES = ("adapted", "zero-shot", "trained")


@dataclass(frozen=True)
class ResultRow:
    """One way of learning tasks, measured on a run or on runs that differ only in their seed."""

    run: str
    method: str
    stage: str
    phase: str
    shots: int | None
    setting: str
    split: str
    metric: str
    """Empty if the tasks have different metrics."""
    scores: Mapping[str, float]
    """By task, the mean score over seeds."""
    repeats: int
    """The number of scores of a task: runs times seeds."""
    estimate: Estimate
    parameters: int | None
    seconds: float | None
    """The mean time over tasks and seeds."""

    @property
    def name(self) -> str:
        """A few words that distinguish it from the other rows."""
        if self.stage == "trained":
            way = "tasks of training"
        elif self.stage == "zero-shot":
            way = "zero-shot"
        else:
            way = self.phase if self.shots is None else f"{self.phase}, {self.shots} shots"
        split = "" if self.split == "test" else self.split
        return ", ".join(filter(None, (f"{self.run}: {way}", self.setting, split)))


@dataclass(frozen=True)
class Reference:
    """A run or a row that rows are compared with."""

    name: str
    others: Sequence[int | None]
    """For each row, the row that it is compared with."""
    differences: Sequence[Estimate | None]
    """For each row, its score minus the other's, paired by task; None if they share no task."""


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ only in their seed.

    Returns:
        The runs of each group, by a name; a single run keeps its own name.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        config = {k: v for k, v in run.config.items() if k != "seed"}
        key = json.dumps(config, sort_keys=True, default=str) if config else str(run.folder)
        seeds = [other.config.get("seed") for other in alike.get(key, [])]
        if run.config.get("seed") in seeds:  # two runs with one seed are not one group
            key = str(run.folder)
        alike.setdefault(key, []).append(run)
    taken = {run.name for run in runs}
    named: dict[str, list[Run]] = {}
    for members in alike.values():
        name = members[0].name
        if len(members) > 1:
            common = os.path.commonprefix([run.name for run in members])  # noqa: RUF071 - of text
            common = re.sub(r"([-_. /]+(seed|s)?[-_. ]*)$", "", common)
            name = next((n for n in (common, members[0].method) if n and n not in taken), name)
        taken.add(name)
        named[name] = members
    return named


def summarise(grouped: Mapping[str, Sequence[Run]]) -> list[ResultRow]:
    """The rows of all ways: adapted, then zero-shot, then tasks of training."""
    rows = [row for name, runs in grouped.items() for row in _rows(name, runs)]
    names = list(grouped)

    def place(row: ResultRow) -> tuple[int, ...]:
        phase = PHASES.index(row.phase) if row.phase in PHASES else len(PHASES)
        return STAGES.index(row.stage), names.index(row.run), phase, row.shots or 0

    return sorted(rows, key=place)


def _rows(name: str, runs: Sequence[Run]) -> Iterator[ResultRow]:
    ways: dict[tuple[str, str, int | None, str, str], list[Result]] = {}
    for run in runs:
        for r in run.results:
            ways.setdefault((r.stage, r.phase, r.shots, r.setting, r.split), []).append(r)
    for (stage, phase, shots, setting, split), results in ways.items():
        by_task: dict[str, list[float]] = {}
        for r in results:
            by_task.setdefault(r.task, []).append(r.score)
        scores = {task: float(np.mean(values)) for task, values in sorted(by_task.items())}
        metrics = {r.metric for r in results}
        seconds = [r.seconds for r in results if r.seconds is not None]
        yield ResultRow(
            name, runs[0].method, stage, phase, shots, setting, split,
            metrics.pop() if len(metrics) == 1 else "",
            scores,
            max(map(len, by_task.values())),
            estimates(np.array([list(scores.values())]).T)[0],
            results[0].parameters,
            float(np.mean(seconds)) if seconds else None,
        )  # fmt: skip


def references(rows: Sequence[ResultRow], grouped: Mapping[str, Sequence[Run]]) -> list[Reference]:
    """Everything that rows can be compared with: runs, `shared` first, then single rows."""
    shared = [name for name, runs in grouped.items() if runs[0].method == "shared"]
    measured = {row.run for row in rows}
    found = [
        _reference(rows, name, [_counterpart(rows, row, name) for row in rows])
        for name in dict.fromkeys((*shared, *grouped))
        if name in measured
    ]
    return found + [_reference(rows, row.name, [i] * len(rows)) for i, row in enumerate(rows)]


def _counterpart(rows: Sequence[ResultRow], row: ResultRow, run: str) -> int | None:
    """The row of a run that matches another row: the same shots, and if possible phase."""
    alike = [
        i
        for i, other in enumerate(rows)
        if (other.run, other.stage, other.shots) == (run, row.stage, row.shots)
    ]
    alike.sort(key=lambda i: (rows[i].phase != row.phase, rows[i].setting != row.setting))
    return alike[0] if alike else None


def _reference(rows: Sequence[ResultRow], name: str, others: Sequence[int | None]) -> Reference:
    """Compare each row with another, over the tasks that both have scored on the same split."""
    found: list[Estimate | None] = [None] * len(rows)
    alike: dict[tuple[str, ...], dict[int, list[float]]] = {}
    for i, other in enumerate(others):
        if other is None or other == i or rows[i].split != rows[other].split:
            continue
        one, to = rows[i].scores, rows[other].scores
        common = tuple(task for task in one if task in to)
        if common:
            alike.setdefault(common, {})[i] = [one[task] - to[task] for task in common]
    for columns in alike.values():
        for i, estimate in zip(columns, estimates(np.array([*columns.values()]).T), strict=True):
            found[i] = estimate
    return Reference(name, others, found)
