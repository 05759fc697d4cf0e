"""Ways to start the skills of an inventory apart, for `lm_studies.py`.

Shape letters: T tasks, G groups, N routers, H heads, K skills, r rank, D width of a head's block.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from paper_study import Study
from scipy.optimize import linear_sum_assignment

import polyroute as pr
from polyroute.kinds.choose import ModelKind
from polyroute.study.alignment import Alignment, alignment
from polyroute.study.examples import encoded

__all__ = ["alike", "balanced_groups", "centred", "grouped"]

Floats = NDArray[np.float64]
EXAMPLES = 16
"""Examples of a task whose gradient is taken."""
LOGIT = 3.0
"""A task starts with this logit for the skill of its group, and its negative for the others."""
RESTARTS = 20
ROUNDS = 100


@torch.no_grad()
def alike(study: Study, model: pr.RoutedModel, kind: ModelKind) -> None:
    """Give all skills the same A, so that every mixture of them has its size."""
    for stack in model.inventory.stacks:
        a_nHKrD = model.inventory.get_parameter(f"lora_a.{stack.key}")
        a_nHKrD.copy_(a_nHKrD[:, :, :1].expand_as(a_nHKrD))


@torch.no_grad()
def grouped(study: Study, model: pr.RoutedModel, kind: ModelKind) -> None:
    """Give each skill a group of tasks whose gradients agree at the base, and all skills one A."""
    alike(study, model, kind)
    rows = {
        task: list(encoded(study.suite, task, "train", kind).select(range(EXAMPLES)))
        for task in study.train
    }
    groups = balanced_groups(
        centred(_cosines(alignment(model, kind, rows))), model.inventory.num_skills
    )
    for task, group in zip(study.train, groups, strict=True):
        logits_NHK = torch.full(model.routes.shape or (), -LOGIT)
        logits_NHK[..., group] = LOGIT
        model.routes[task] = logits_NHK


def _cosines(found: Alignment) -> Floats:
    """The mean cosine over sites of the tasks' gradients, `[T, T]`."""
    cosines_TT = np.eye(len(found.tasks))
    for (i, j), value in zip(found.pairs, found.effective.nanmean(0).tolist(), strict=True):
        cosines_TT[i, j] = cosines_TT[j, i] = value
    return cosines_TT


def centred(similarity_TT: Floats) -> Floats:
    """The similarity of what is left of vectors when their mean is subtracted."""
    rows = similarity_TT - similarity_TT.mean(0)
    products = rows - rows.mean(1, keepdims=True)
    norms = np.sqrt(np.clip(products.diagonal(), 1e-12, None))
    return products / norms / norms[:, None]


def balanced_groups(similarity_TT: Floats, groups: int, seed: int = 0) -> Sequence[int]:
    """k-means in which no group has more than its share of tasks; the best of several starts.

    Args:
        similarity_TT: inner products of unit vectors.
        groups: how many.
        seed: of the starts.

    Returns:
        The group of each task.
    """
    tasks = len(similarity_TT)
    places = np.arange(tasks) % groups
    generator = np.random.default_rng(seed)
    best, best_score = places, -np.inf
    for _ in range(RESTARTS):
        own = generator.permutation(places)
        score = -np.inf
        for _ in range(ROUNDS):
            # The mean inner product with a group's members is that with its centroid.
            closeness_TG = similarity_TT @ np.eye(groups)[own] / np.bincount(own)
            _, seats = linear_sum_assignment(-closeness_TG[:, places])
            found = places[seats]
            new = float(closeness_TG[np.arange(tasks), found].sum())
            if new <= score + 1e-12:
                break
            own, score = found, new
        if score > best_score:
            best, best_score = own, score
    return [int(group) for group in best]
