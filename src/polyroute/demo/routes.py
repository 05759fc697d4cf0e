"""How well the learned routes follow the skills that the tasks are composed of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polyroute.demo.suite import SKILLS, TASKS
from polyroute.saved.checkpoint import Checkpoint
from polyroute.study.analysis import saved_weights
from polyroute.study.routing_measures import route_similarity

__all__ = ["RouteReport", "relate_routes_to_skills"]

STAGES = tuple(dict.fromkeys(SKILLS.values()))


@dataclass(frozen=True)
class RouteReport:
    """A comparison of learned routes with true skills."""

    tasks: tuple[str, ...]
    similarity: npt.NDArray[np.float64]
    """The cosine between centred routes, `[T, T]`."""
    rank_correlation: float
    """The Spearman correlation, over pairs of tasks, of route similarity and number of shared
    skills."""
    p_value: float
    """The share of random relabellings of the tasks with a correlation at least as high."""
    same_skill: dict[str, tuple[float, float]]
    """By stage: how often the task with the nearest route has the same skill, and chance."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "tasks": list(self.tasks),
            "similarity": self.similarity.round(4).tolist(),
            "rank_correlation": self.rank_correlation,
            "p_value": self.p_value,
            "nearest_has_same_skill": {
                stage: {"share": share, "chance": chance}
                for stage, (share, chance) in self.same_skill.items()
            },
        }

    def in_words(self) -> list[str]:
        """The report as sentences."""
        stages = ", ".join(
            f"{stage} {share:.2f} (chance {chance:.2f})"
            for stage, (share, chance) in self.same_skill.items()
        )
        return [
            "The more skills two training tasks share, the more alike mhr routes them: rank "
            f"correlation {self.rank_correlation:.2f} over pairs "
            f"(p = {self.p_value:.3f} by relabelling).",
            f"The nearest task by route has the same skill in these shares of tasks: {stages}.",
        ]


def relate_routes_to_skills(checkpoint: Checkpoint, permutations: int = 999) -> RouteReport:
    """Compare the routes of the training tasks with their compositions of skills.

    Args:
        checkpoint: an inventory trained on the demo suite.
        permutations: the number of relabellings for the p-value.
    """
    skills = {task.name: task.skills for task in TASKS}
    tasks = checkpoint.tasks
    weights = saved_weights(checkpoint)
    assert weights is not None
    similarity = route_similarity(weights).double().numpy()
    labels = np.array([skills[task] for task in tasks])
    shared = (labels[:, None] == labels[None]).sum(-1)
    upper = np.triu_indices(len(tasks), 1)
    found = _spearman(similarity[upper], shared[upper])
    rng = np.random.default_rng(0)
    orders = (rng.permutation(len(tasks)) for _ in range(permutations))
    higher = sum(
        _spearman(similarity[upper], shared[np.ix_(order, order)][upper]) >= found
        for order in orders
    )
    return RouteReport(
        tasks,
        similarity,
        found,
        (1 + higher) / (1 + permutations),
        {stage: _same_skill(similarity, labels[:, i]) for i, stage in enumerate(STAGES)},
    )


def _same_skill(
    similarity: npt.NDArray[np.float64], labels: npt.NDArray[np.str_]
) -> tuple[float, float]:
    others = similarity - 3 * np.eye(len(labels))
    nearest = others.argmax(1)
    same = labels[:, None] == labels[None]
    chance = (same.sum() - len(labels)) / (len(labels) * (len(labels) - 1))
    return float((labels[nearest] == labels).mean()), float(chance)


def _spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.int64]) -> float:
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The ranks of values, from 0; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts + 1) / 2
    ranks: npt.NDArray[np.float64] = means[inverse]
    return ranks


def skill_order(tasks: Sequence[str]) -> list[int]:
    """Positions of the tasks, sorted by transform, then select, then format."""
    skills = {task.name: task.skills for task in TASKS}
    return sorted(
        range(len(tasks)), key=lambda i: tuple(skills[tasks[i]][stage] for stage in (1, 0, 2))
    )
