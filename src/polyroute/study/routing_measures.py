"""Measures of a routing: from the weights and logits of tasks to a number for each task or router.

Shape letters: T tasks, N routers, H heads, K skills.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from polyroute.errors import InputError

__all__ = [
    "diversity",
    "gate_discreteness",
    "gate_efficiency",
    "gate_sparsity",
    "route_similarity",
    "routing_entropy",
    "skill_likeness",
    "skill_usage",
]


def route_similarity(weights: Tensor) -> Tensor:
    """How alike tasks are routed: cosine between their centred weights.

    Args:
        weights: `[T, N, H, K]`.

    Returns:
        `[T, T]`, from -1 to 1. The mean over tasks is subtracted first, because what all tasks
        share does not tell which of them are alike.
    """
    flat = weights.flatten(1)
    flat = flat - flat.mean(0, keepdim=True)
    flat = torch.nn.functional.normalize(flat, dim=-1)
    return flat @ flat.t()


def routing_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of a task's mixtures, as a share of the uniform mixture's.

    Args:
        weights: `[T, N, H, K]`.

    Returns:
        `[T]`.
    """
    skills = weights.shape[-1]
    if skills == 1:
        return torch.zeros(len(weights))
    share = weights.clamp_min(1e-12)
    entropy = -(share * share.log()).sum(-1) / torch.log(torch.tensor(float(skills)))
    return entropy.mean((1, 2))


def skill_usage(weights: Tensor) -> Tensor:
    """The share that each skill has in a router's mixtures, as a mean over tasks and heads.

    Args:
        weights: `[T, N, H, K]`.

    Returns:
        `[N, K]`.
    """
    return weights.mean((0, 2))


def skill_likeness(skills: Iterable[Tensor]) -> float | None:
    """How alike skills are: the mean cosine between two of them, over all pairs.

    Args:
        skills: tensors whose first axis is the skills, `[K, ...]`; together they hold each skill.

    Returns:
        From -1 to 1; None if there is only one skill, or if one of them is zero.
    """
    flat = (part.flatten(1) for part in skills)
    products = torch.stack([part @ part.t() for part in flat]).sum(0)
    lengths = products.diagonal().sqrt()
    count = len(products)
    if count == 1 or not bool((lengths > 0).all()):
        return None
    cosines = products / lengths[:, None] / lengths
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def diversity(weights: Tensor, *, over: str) -> Tensor:
    """How much the mixtures of a task differ between its heads, or between its routers.

    It is the mean of 1 - cos of the weights over all pairs of heads of one router (or of routers at
    one head). 0 means that all are the same, as over the heads of Poly, or that there is only one;
    1 means that no two share a skill.

    Args:
        weights: `[T, N, H, K]`.
        over: `"heads"` or `"routers"`.

    Returns:
        `[T]`.

    Raises:
        InputError: it is neither.
    """
    if over not in ("heads", "routers"):
        raise InputError(f"over must be 'heads' or 'routers', not {over!r}")
    axis = 2 if over == "heads" else 1
    count = weights.shape[axis]
    if count == 1:
        return torch.zeros(len(weights))
    unit = torch.nn.functional.normalize(weights, dim=-1)
    # The squared length of the sum of unit vectors is their number plus twice the pairs' cosines.
    cosines = (unit.sum(axis).square().sum(-1) - unit.square().sum((axis, -1))) / (
        count * (count - 1)
    )
    return (1 - cosines).clamp_min(0).mean(1)


def gate_sparsity(logits: Tensor) -> Tensor:
    """The share of gates of a router that are open, which means sigmoid(z) > 1/2.

    Published runs monitor this measure, `gate_discreteness` and `gate_efficiency`.

    Args:
        logits: `[T, N, H, K]`.

    Returns:
        `[N]`.
    """
    return (logits > 0).float().mean((0, 2, 3))


def gate_discreteness(logits: Tensor) -> Tensor:
    """How undecided the gates of a router are: mean entropy in bits of a coin with p = sigmoid(z).

    It is 1 where every gate is half open, and 0 where all are open or shut.

    Args:
        logits: `[T, N, H, K]`.

    Returns:
        `[N]`.
    """
    z = logits.double()
    open_, shut = z.sigmoid(), (-z).sigmoid()
    log = torch.nn.functional.logsigmoid
    entropy: Tensor = -(open_ * log(z) + shut * log(-z)) / math.log(2)
    return entropy.mean((0, 2, 3)).float()


def gate_efficiency(logits: Tensor) -> Tensor:
    """How evenly all tasks together use the gates of a router, from 0 to 1.

    The mean of sigmoid(z) over tasks is scaled to sum to one over the H * K gates of a row. The
    measure is the entropy of that, as a share of log(H * K); it is 1 where there is one gate.

    Args:
        logits: `[T, N, H, K]`.

    Returns:
        `[N]`.
    """
    gates = logits.double().sigmoid().mean(0).flatten(1)
    if gates.shape[1] == 1:
        return torch.ones(len(gates))
    share = gates / gates.sum(1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(1)
    return (entropy / math.log(gates.shape[1])).float()
