"""Charts of the alignment of gradients that runs measured during training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyroute.report_page.charts import Chart, Point, Series, chart_of, thin
from polyroute.report_page.data import Run, clean

__all__ = ["alignment_charts"]

MEASURES = {
    "effective": ("Alignment of the tasks' own gradients", "cosine"),
    "inventory": ("Alignment of the inventory's gradients", "cosine"),
    "overlap": ("Overlap of routes", "overlap"),
}
"""Title and unit of each measure, by its name in `alignment.json`."""


def alignment_charts(
    runs: Sequence[Run], colours: Mapping[str, int], notes: list[str]
) -> list[Chart]:
    """Charts over steps, layers and pairs of tasks, for each measure."""
    charts: list[Chart | None] = []
    measured = {run.name: _values(run, notes) for run in runs if run.alignment is not None}
    for measure, (what, unit) in MEASURES.items():
        found = {
            name: (content, content.measures[measure])
            for name, content in measured.items()
            if content is not None and measure in content.measures
        }
        views = {
            "steps": {n: _finite(c.steps, _mean(v, (1, 2)), ()) for n, (c, v) in found.items()},
            "layers": {
                n: _finite(range(1, len(c.sites) + 1), _mean(v, (0, 2)), c.sites)
                for n, (c, v) in found.items()
            },
            "pairs": _by_pair({n: (c.pairs, _mean(v, (0, 1))) for n, (c, v) in found.items()}),
        }
        for view, axis in (("steps", "step"), ("layers", "layer"), ("pairs", "pair of tasks")):
            is_dots = view == "pairs"
            series = [
                Series(name, colours[name], points, colours[name] if is_dots else None, not is_dots)
                for name, points in views[view].items()
                if points
            ]
            title = f"{what}, over {view}"
            charts.append(chart_of(f"alignment-{measure}-{view}", title, axis, unit, series))
    return [chart for chart in charts if chart is not None]


class _Alignment(NamedTuple):
    steps: Sequence[float]
    sites: Sequence[str]
    pairs: Sequence[str]
    measures: Mapping[str, npt.NDArray[np.float64]]
    """By name, `[M, S, P]`: measurements, sites, pairs; NaN where nothing was measured."""


def _values(run: Run, notes: list[str]) -> _Alignment | None:
    try:
        return _alignment(run.alignment or {})
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        notes.append(f"Left out: {run.folder / 'alignment.json'} is damaged.")
        return None


def _alignment(content: Mapping[str, Any]) -> _Alignment | None:
    tasks = [clean(task) for task in content["tasks"]]
    sites = [clean(site) for site in content["sites"]]
    pairs = [f"{tasks[i]} and {tasks[j]}" for i, j in content["pairs"]]
    measurements = content["measurements"]
    if not measurements or not sites or not pairs:
        return None
    measures = {}
    for name in MEASURES:
        if all(name in measurement for measurement in measurements):
            values = np.array([measurement[name] for measurement in measurements], dtype=float)
            measures[name] = values.reshape(len(measurements), len(sites), len(pairs))
    return _Alignment([float(m["step"]) for m in measurements], sites, pairs, measures)


def _by_pair(
    found: Mapping[str, tuple[Sequence[str], npt.NDArray[np.float64]]],
) -> dict[str, list[Point]]:
    """A point for each pair and run; all runs list the pairs by their mean over the runs."""
    values: dict[str, list[float]] = {}
    for pairs, numbers in found.values():
        for pair, number in zip(pairs, numbers, strict=True):
            if math.isfinite(number):
                values.setdefault(pair, []).append(float(number))
    order = sorted(values, key=lambda pair: -sum(values[pair]) / len(values[pair]))
    place = {pair: x for x, pair in enumerate(order, 1)}
    return {
        name: thin(
            sorted(
                Point(place[pair], float(number), label=pair)
                for pair, number in zip(pairs, numbers, strict=True)
                if math.isfinite(number)
            )
        )
        for name, (pairs, numbers) in found.items()
    }


def _mean(values: npt.NDArray[np.float64], axes: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The mean of the finite values; NaN where there are none."""
    number = np.isfinite(values).sum(axes)
    total = np.where(np.isfinite(values), values, 0.0).sum(axes)
    mean: npt.NDArray[np.float64] = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return mean


def _finite(xs: Sequence[float], ys: npt.NDArray[np.float64], labels: Sequence[str]) -> list[Point]:
    return [
        Point(x, float(y), label=labels[i] if labels else "")
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
        if math.isfinite(y)
    ]
