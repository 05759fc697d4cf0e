"""The charts of a report as data, for `figures` and for the page's script to draw."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from polyroute.report_page.data import Run
from polyroute.report_page.summary import ResultRow

__all__ = [
    "NEUTRAL",
    "Chart",
    "Point",
    "Series",
    "chart_of",
    "coming_apart",
    "learning",
    "parameters",
    "shots",
    "thin",
]

MOST_POINTS = 500
"""The most points of a series: more than the pixels of a screen would only enlarge the page."""
VALIDATION = 0
"""The marker on curves of the validation loss."""
NEUTRAL = -1
"""The colour of a series that belongs to no run."""


class Point(NamedTuple):
    """One point of a series; it may lack an interval and a label."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour and one marker."""

    name: str
    colour: int
    points: Sequence[Point]
    marker: int | None = None
    """None for a line without markers."""
    line: bool = True


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    key: str
    """Its name in the page, and that of its files."""
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log: bool = False
    """Whether the x axis is logarithmic."""

    def to_dict(self) -> dict[str, Any]:
        """The chart as JSON values."""
        return asdict(self)


def learning(runs: Sequence[Run], colours: Mapping[str, int]) -> Chart | None:
    """The training loss of each run over steps and, where there is one, its validation loss."""
    curves = [
        (name, colours[run.name], losses, marker)
        for run in runs
        for name, losses, marker in (
            (run.name, run.losses, None),
            (f"{run.name}, validation", run.validation, VALIDATION),
        )
        if losses
    ]
    series = [
        Series(name, colour, thin([Point(*pair) for pair in losses]), marker)
        for name, colour, losses, marker in curves
    ]
    y = "loss" if any(run.validation for run in runs) else "training loss"
    return chart_of("learning", "Learning curves", "step", y, series)


def coming_apart(runs: Sequence[Run], colours: Mapping[str, int]) -> list[Chart | None]:
    """How uniform the mixtures of each run are over steps, and how alike its skills."""
    entropy = {run.name: run.entropy for run in runs if run.entropy}
    likeness = {run.name: run.likeness for run in runs if run.likeness}
    return [
        chart_of(
            key, title, "step", unit,
            [
                Series(name, colours[name], thin([Point(*pair) for pair in pairs]))
                for name, pairs in measured.items()
            ],
        )
        for key, title, unit, measured in (
            ("entropy", "Entropy of the mixtures", "entropy, 1 if uniform", entropy),
            ("likeness", "Likeness of the skills", "mean cosine between two skills", likeness),
        )
    ]  # fmt: skip


def shots(rows: Sequence[ResultRow], colours: Mapping[str, int]) -> Chart | None:
    """The mean score over shots, for each way that was measured at several numbers of shots."""
    series = [
        Series(name, colour, _along([_point(row, row.shots or 0) for row in members]), marker)
        for name, colour, marker, members in _ways(
            [row for row in rows if row.shots], colours, by_shots=False
        )
        if len(members) > 1
    ]
    return chart_of("shots", "Adaptation curves", "shots", "mean score", series, log=True)


def parameters(rows: Sequence[ResultRow], colours: Mapping[str, int]) -> Chart | None:
    """The mean score over the parameters that are trained for a new task.

    A phase of poly and mhr becomes a curve if it was measured at three or more sizes, as phase z is
    with several numbers of heads.
    """
    rows = [row for row in rows if row.parameters]
    ways = list(_ways(rows, colours, by_shots=True))
    curves: dict[tuple[Any, ...], list[Point]] = {}
    for row in rows:
        if row.stage == "adapted" and row.method in ("poly", "mhr"):
            key = (row.phase, row.shots, row.setting, row.split)
            curves.setdefault(key, []).append(_point(row, row.parameters or 0))
    series = [
        Series("", NEUTRAL, _along(points))
        for points in curves.values()
        if len({point.x for point in points}) > 2
    ]
    series += [
        Series(name, colour, [_point(row, row.parameters or 0) for row in members], marker, False)
        for name, colour, marker, members in ways
    ]
    return chart_of(
        "parameters", "Scores over trained parameters", "parameters trained for a new task",
        "mean score", series, log=True,
    )  # fmt: skip


def _ways(
    rows: Sequence[ResultRow], colours: Mapping[str, int], *, by_shots: bool
) -> Iterator[tuple[str, int, int, list[ResultRow]]]:
    """Groups of adapted rows, each with a name, the colour of its run and a marker."""
    rows = [row for row in rows if row.stage == "adapted"]
    phases = list(dict.fromkeys(row.phase for row in rows))
    ways: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        key = (row.run, row.phase, row.setting, row.split, row.shots if by_shots else None)
        ways.setdefault(key, []).append(row)
    for (run, phase, setting, split, number), members in ways.items():
        shots = f"{number} shots" if by_shots and len({row.shots for row in rows}) > 1 else ""
        name = ", ".join(
            filter(None, (f"{run}: {phase}", shots, setting, "" if split == "test" else split))
        )
        yield name, colours[run], phases.index(phase), members


def _point(row: ResultRow, x: float) -> Point:
    return Point(x, row.estimate.mean, row.estimate.low, row.estimate.high)


def _along(points: Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.x)


def thin(points: Sequence[Point]) -> list[Point]:
    """The points, or evenly spaced ones and the last if there are too many."""
    step = -(-len(points) // MOST_POINTS) or 1
    return [*points[::step], *([] if (len(points) - 1) % step == 0 else points[-1:])]


def chart_of(
    key: str, title: str, x: str, y: str, series: Sequence[Series], *, log: bool = False
) -> Chart | None:
    """Make a chart; None without series."""
    return Chart(key, title, x, y, series, log) if series else None
