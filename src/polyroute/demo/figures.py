"""The plots of the demo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from polyroute.demo.routes import RouteReport, skill_order

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["draw_accuracy", "draw_routes"]

COLOURS = {"shared": "#777777", "poly": "#3b7dd8", "mhr": "#d8572a"}


def draw_accuracy(path: Path, summary: Sequence[dict[str, Any]]) -> None:
    """Plot accuracy on held-out tasks over the parameters that each way trains."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for entry in summary:
        axes.errorbar(
            entry["trained_parameters"],
            entry["accuracy"],
            yerr=entry["standard_error"] or 0.0,
            fmt="o",
            color=COLOURS[entry["method"]],
            capsize=3,
        )
        axes.annotate(
            f"{entry['method']} {entry['phase']}",
            (entry["trained_parameters"], entry["accuracy"]),
            textcoords="offset points",
            xytext=(7, -14 if entry["method"] == "mhr" else 5),
            fontsize=9,
            color=COLOURS[entry["method"]],
        )
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_ylim(0, 1)
    axes.set_xlabel("parameters trained for a new task")
    axes.set_ylabel("accuracy on held-out compositions")
    axes.set_title("Few-shot adaptation (bars: standard error)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_routes(path: Path, routes: RouteReport) -> None:
    """Plot route similarity of the training tasks, sorted by skill, beside their shared skills."""
    order = skill_order(routes.tasks)
    names = [routes.tasks[i] for i in order]
    parts = np.array([name.split("-") for name in names])
    shared = (parts[:, None] == parts[None]).sum(-1)
    learned = routes.similarity[np.ix_(order, order)].copy()
    np.fill_diagonal(learned, np.nan)
    truth = shared.astype(float)
    np.fill_diagonal(truth, np.nan)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.5, 7), layout="constrained")
    bound = float(np.nanmax(np.abs(learned)))
    image = left.imshow(learned, cmap="RdBu_r", vmin=-bound, vmax=bound)
    left.set_title(f"similarity of learned routes (rank correlation {routes.rank_correlation:.2f})")
    figure.colorbar(image, ax=left, shrink=0.7)
    image = right.imshow(truth, cmap="viridis", vmin=0, vmax=2)
    right.set_title("skills that two tasks share")
    figure.colorbar(image, ax=right, shrink=0.7, ticks=[0, 1, 2])
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks(range(len(names)), names, fontsize=6)
    right.set_yticks([])
    figure.savefig(path, dpi=150)
    plt.close(figure)
