"""Whether tasks of one category are routed alike.

Shape letter: T tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["CategoryRelation", "linkage_of", "relate_to_categories"]

PERMUTATIONS = 10_000


@dataclass(frozen=True)
class CategoryRelation:
    """Whether tasks of one category are routed alike."""

    tasks: int
    """How many tasks have a category; the others are left out."""
    categories: int
    ari: float
    """Adjusted Rand index of the clusters by route, of which there are as many as categories: 1
    where they are the categories, about 0 by chance."""
    purity: float
    """Share of tasks whose nearest task by route is of their category."""
    chance: float
    """The purity that is expected if the nearest task is drawn at random: the mean over tasks of
    the share of the other tasks that are of their category."""
    p: float
    """Share of 10,000 random exchanges of the categories, and of the true one, that are at least as
    pure."""


def relate_to_categories(
    similarity: Tensor, categories: Sequence[str], *, seed: int = 0
) -> CategoryRelation | None:
    """Compare how tasks are routed with the categories that they belong to.

    Args:
        similarity: `[T, T]`, as `route_similarity` gives it.
        categories: the category of each task; empty where it has none.
        seed: seed of the exchanges that `p` counts.

    Returns:
        The relation; None where fewer than two categories are left, or no category has two tasks.
    """
    from scipy.cluster.hierarchy import fcluster
    from sklearn.metrics import adjusted_rand_score

    known = [i for i, category in enumerate(categories) if category]
    names, labels = np.unique([categories[i] for i in known], return_inverse=True)
    count, sizes = len(known), np.bincount(labels)
    if len(names) < 2 or len(names) == count:
        return None
    near = similarity[known][:, known]
    clusters = fcluster(linkage_of(near), len(names), "maxclust")
    nearest = near.clone().fill_diagonal_(-2).argmax(1).numpy()
    same = int((labels[nearest] == labels).sum())
    random = np.random.default_rng(seed)
    exchanged = (random.permutation(labels) for _ in range(PERMUTATIONS))
    as_pure = sum(int((other[nearest] == other).sum()) >= same for other in exchanged)
    return CategoryRelation(
        tasks=count,
        categories=len(names),
        ari=float(adjusted_rand_score(labels, clusters)),
        purity=same / count,
        chance=float((sizes * (sizes - 1)).sum() / (count * (count - 1))),
        p=(as_pure + 1) / (PERMUTATIONS + 1),
    )


def linkage_of(similarity: Tensor) -> npt.NDArray[np.float64]:
    """The merges of average linkage on 1 - cos, `[T - 1, 4]`, as scipy writes them.

    Args:
        similarity: `[T, T]`, as `route_similarity` gives it.
    """
    from scipy.cluster.hierarchy import linkage

    i, j = np.triu_indices(len(similarity), 1)
    distances = 1 - similarity.double().clamp(-1, 1).numpy()[i, j]
    # Ordered so that neighbouring leaves are alike; half a second for 500 tasks.
    merges: npt.NDArray[np.float64] = linkage(distances, "average", optimal_ordering=True)
    return merges
