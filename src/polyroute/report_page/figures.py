"""Drawing the charts, heat maps and task maps of a report as PNG and SVG."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

from polyroute.report_page.charts import NEUTRAL, Chart, Series
from polyroute.report_page.routing import Routing

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.figure import Figure

__all__ = ["draw_chart", "draw_routing"]

# The light colours of style.css: distinct for colour-blind readers; dashes and markers differ too.
COLOURS = (
    "#0072b2", "#c44e00", "#007a5a", "#b0478f", "#8a6a00", "#4b3fa7", "#5f6b76", "#8c2d19",
)  # fmt: skip
DASHES = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))
MARKERS = "os^DvPXp"
LONGEST = 40
# Task names are plain text, in which `$` starts no formula; ids in SVG are the same in each run.
STYLE: Any = {"text.parse_math": False, "svg.hashsalt": "polyroute"}


def draw_chart(stem: Path, chart: Chart) -> None:
    """Write one chart as `<stem>.png` and `<stem>.svg`."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        for series in chart.series:
            is_neutral = series.colour == NEUTRAL
            colour = "#999999" if is_neutral else COLOURS[series.colour % len(COLOURS)]
            xs = [point.x * _aside(chart, series) for point in series.points]
            axes.plot(
                xs,
                [point.y for point in series.points],
                color=colour,
                linestyle=DASHES[series.colour % len(DASHES)] if series.line else "none",
                linewidth=1 if is_neutral else 1.8,
                marker=None if series.marker is None else MARKERS[series.marker % len(MARKERS)],
                label=_short(series.name) or None,
            )
            for x, point in zip(xs, series.points, strict=True):
                if point.low is not None and point.high is not None and not is_neutral:
                    axes.plot([x, x], [point.low, point.high], color=colour, linewidth=1)
        if chart.log:
            _name_decades(axes, [point.x for series in chart.series for point in series.points])
        axes.set_title(chart.title)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        _save(figure, stem)


def _aside(chart: Chart, series: Series) -> float:
    """The factor on x that keeps intervals of different series from overlapping."""
    named = [each for each in chart.series if each.name]
    if not chart.log or series not in named:
        return 1.0
    xs = [point.x for each in named for point in each.points]
    width = max(math.log(max(xs) / min(xs)), 1.0)
    place = named.index(series) - (len(named) - 1) / 2
    return math.exp(place * width * min(0.012, 0.06 / len(named)))


def _name_decades(axes: Any, xs: Sequence[float]) -> None:
    """Make the x axis logarithmic, with plain numbers at its ticks."""
    axes.set_xscale("log")
    measured = sorted(set(xs))
    if len(measured) < 9 and all(b > 1.8 * a for a, b in pairwise(measured)):
        axes.xaxis.set_major_locator(ticker.FixedLocator(measured))
    else:
        subs = (1, 2, 5) if max(xs) < 300 * min(xs) else (1,)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def draw_routing(stem: Path, routing: Routing) -> None:
    """Write the mean weights of the tasks, and their map, as `<stem>.png` and `<stem>.svg`."""
    order = list(routing.order)
    weights = routing.weights.mean((1, 2))[order]
    tasks, skills = weights.shape
    height = min(max(4.0, 0.16 * tasks), 40.0)
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(13, height), layout="constrained", width_ratios=(1, 1.1)
        )
        image = left.imshow(weights, aspect="auto", cmap="Blues", interpolation="nearest")
        names = [_short(routing.tasks[i]) for i in order]
        left.set_yticks(range(tasks), names, fontsize=6 if tasks <= 250 else 3)
        left.set_xticks(range(skills), [str(k + 1) for k in range(skills)], fontsize=7)
        left.set_xlabel("skill")
        left.set_title(_short(f"{routing.run}: mean weight over routers and heads"))
        figure.colorbar(image, ax=left, shrink=min(1.0, 4 / height), label="weight")
        for i, category in enumerate(found := _distinct(routing.categories)):
            chosen = [t for t in range(tasks) if not found or routing.categories[t] == category]
            right.scatter(
                *routing.places[chosen].T, s=28, color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[(i // len(COLOURS) + i) % len(MARKERS)],
                label=_short(category) or "without category",
            )  # fmt: skip
        if not found:
            right.scatter(*routing.places.T, s=28, color=COLOURS[0])
        right.set_title("tasks by likeness of their routes")
        right.set_xlabel(f"first axis ({routing.shares[0]:.0%} of the variance)")
        right.set_ylabel(f"second axis ({routing.shares[1]:.0%})")
        right.set_box_aspect(1)
        if found:
            right.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, frameon=False)
        _save(figure, stem)


def _distinct(categories: Sequence[str]) -> list[str]:
    return sorted(set(categories), key=lambda name: (name == "", name))


def _save(figure: Figure, stem: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font lacks a script
        figure.savefig(stem.with_name(stem.name + ".png"), dpi=140)
        figure.set_layout_engine("none")  # keep the layout, which is slow to compute
        figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None})
    plt.close(figure)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
