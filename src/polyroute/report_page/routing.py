"""How tasks use skills, prepared for the routing explorer and its figures."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from polyroute.errors import InputError
from polyroute.loading import load_suite
from polyroute.report_page.data import Run, clean
from polyroute.saved.checkpoint import Checkpoint, read_checkpoint
from polyroute.study.analysis import RoutingAnalysis, analyse, saved_weights

__all__ = ["Routing", "categories_of", "routing_of"]

MOST_CELLS = 30_000
"""The most cells of a heat map: a page with more is slow to scroll."""
MOST_NUMBERS = 6_000_000
"""The most numbers of all runs in one page: they take 16 MB."""
STEPS = 30_000
"""Weights are stored as whole numbers up to this one, which is more precise than three digits."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class Routing:
    """The routing table of one run."""

    run: str
    tasks: Sequence[str]
    categories: Sequence[str]
    """The category of each task; empty if none are known."""
    routers: Sequence[str]
    weights: npt.NDArray[np.float32]
    """`[T, N, H, K]`."""
    about: str
    """A few sentences with the numbers of all tasks; `tasks` may hold only the first of them."""
    order: Sequence[int]
    """An order of the tasks in which neighbours have similar routes, as under a dendrogram."""
    places: npt.NDArray[np.float64]
    """The map of tasks, `[T, 2]`: tasks with similar routes are near each other."""
    shares: tuple[float, float]
    """The share of the routes' variance that each axis of the map shows."""
    nearest: Sequence[Sequence[tuple[int, float]]]
    """For each task, the tasks with the most similar routes, and the cosines."""

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values; weights are base64 of 16-bit whole numbers times `unit`."""
        unit = max(float(np.abs(self.weights).max()), 1e-9) / STEPS
        whole = np.round(self.weights / unit).astype("<i2")
        return {
            "run": self.run,
            "tasks": list(self.tasks),
            "categories": list(self.categories),
            "routers": list(self.routers),
            "heads": self.weights.shape[2],
            "skills": self.weights.shape[3],
            "unit": unit,
            "weights": base64.b64encode(whole.tobytes()).decode(),
            "about": self.about,
            "order": list(self.order),
            "places": np.round(self.places, 4).tolist(),
            "shares": list(self.shares),
            "nearest": [[[i, round(cosine, 3)] for i, cosine in near] for near in self.nearest],
        }


def routing_of(
    run: Run, categories: Mapping[str, str], limit: int, notes: list[str]
) -> Routing | None:
    """Read the routing table of a run; if there is none, a note says why.

    Args:
        run: the run with the inventory.
        categories: the known categories of tasks.
        limit: the most numbers that the table may have; further tasks are left out.
        notes: a list that gets a sentence for each part that is left out.
    """
    if run.inventory is None:
        return None
    try:
        return _routing(run.name, read_checkpoint(run.inventory), categories, limit, notes)
    except InputError as error:
        notes.append(f"The routing of {run.name} is left out: {error}.")
        return None


def _routing(
    name: str, checkpoint: Checkpoint, categories: Mapping[str, str], limit: int, notes: list[str]
) -> Routing | None:
    table, tasks = checkpoint.saved_routes, checkpoint.tasks
    if table is None or not tasks:
        notes.append(f"The tasks of {name} have no routing to show.")
        return None
    skills = table.shape[2]
    found = analyse(checkpoint, categories or None)
    number = min(len(found.tasks), MOST_CELLS // skills, limit // table.width)
    if number < len(tasks):
        notes.append(
            f"The routing of {name} shows the first {number:,} of {len(tasks):,} tasks; "
            "more would make the page too large."
        )
    weights = None if number < 1 else saved_weights(checkpoint, tasks[:number])
    if weights is None:
        return None
    similarity = np.array(found.similarity)[:number, :number]
    places, shares = _map(similarity)
    shown = (found.categories or [])[:number]
    return Routing(
        run=name,
        tasks=[clean(task) for task in tasks[:number]],
        categories=[clean(category) for category in shown] if any(shown) else [],
        routers=[clean(router) for router in found.routers],
        weights=weights.to(torch.float32).numpy(),
        about=_about(found, len(tasks), table.shape),
        order=[i for i in found.order if i < number],
        places=places,
        shares=shares,
        nearest=_nearest(similarity),
    )


def _about(found: RoutingAnalysis, tasks: int, shape: Sequence[int]) -> str:
    routers, heads, skills = shape
    counts = ((tasks, "task"), (routers, "router"), (heads, "head"), (skills, "skill"))
    text = ", ".join(f"{number:,} {name}{'s' * (number != 1)}" for number, name in counts)
    text += f". Entropy of the mixtures: {np.mean(found.entropy):.2f} of that of a uniform mixture."
    relation = found.relation
    if relation is not None:
        text += (
            f" The task with the most similar route has the same category for {relation.purity:.0%}"
            f" of the tasks (chance {relation.chance:.0%}, p = {relation.p:.4f}); the adjusted Rand"
            f" index of clusters by route and categories is {relation.ari:.2f}."
        )
    return text


def _map(
    similarity: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """Classical scaling of the similarities to two axes, and the share of variance of each."""
    tasks = len(similarity)
    centring = np.eye(tasks) - 1 / tasks
    values, vectors = np.linalg.eigh(centring @ similarity @ centring)
    values = np.maximum(values[::-1], 0.0)
    places = np.zeros((tasks, 2))
    kept = min(2, tasks)
    # The sign of a vector is arbitrary; a positive largest entry makes the map reproducible.
    vectors = vectors[:, ::-1][:, :kept]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(kept)])
    places[:, :kept] = vectors * np.where(signs == 0, 1, signs) * np.sqrt(values[:kept])
    total = max(float(values.sum()), 1e-12)
    first, second = (float(v) / total for v in [*values[:2], 0.0][:2])
    return places, (first, second)


def _nearest(similarity: npt.NDArray[np.float64]) -> list[list[tuple[int, float]]]:
    others = similarity.copy()
    np.fill_diagonal(others, -np.inf)
    order = np.argsort(-others, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(others) - 1)]
    return [[(int(j), float(others[i, j])) for j in row] for i, row in enumerate(order)]


def categories_of(
    runs: Sequence[Run],
    data: str | None,
    notes: list[str],
    reader: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The categories of tasks, from the given suite or else from the suites of the runs.

    Raises:
        InputError: the given suite cannot be read.
    """
    found: dict[str, str] = {}
    if data is not None:
        return _categories(data, reader)
    places = {run.data: run.config.get("reader") for run in runs if run.inventory and run.data}
    for place, options in places.items():
        try:
            found |= _categories(str(place), options if isinstance(options, dict) else None)
        except InputError as error:
            notes.append(f"Tasks of {place} have no categories here (--data names it): {error}.")
    return found


def _categories(data: str, reader: Mapping[str, Any] | None) -> dict[str, str]:
    suite = load_suite(data, reader)
    return {task: suite.info(task).category for task in suite.tasks}
