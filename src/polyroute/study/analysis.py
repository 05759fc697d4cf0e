"""What an inventory has learned: how tasks use its skills, and which tasks are alike.

Shape letters: T tasks, N routers, H heads, K skills.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.routes.weights import anneal, skill_weights
from polyroute.saved.checkpoint import Checkpoint

__all__ = [
    "CategoryRelation",
    "RoutingAnalysis",
    "analyse",
    "describe_checkpoint",
    "diversity",
    "gate_discreteness",
    "gate_efficiency",
    "gate_sparsity",
    "relate_to_categories",
    "route_similarity",
    "routing_entropy",
    "saved_weights",
    "skill_usage",
]

LISTED = 500
"""An account of more tasks would be read by nobody, and compares each with each."""
PERMUTATIONS = 10_000
Floats = npt.NDArray[np.float64]


def saved_weights(checkpoint: Checkpoint, tasks: Sequence[str] | None = None) -> Tensor | None:
    """The mixing weights of tasks, default all, in evaluation, `[T, N, H, K]`.

    None without routing, and where there is no task.
    """
    tasks = checkpoint.tasks if tasks is None else tasks
    rows, table = checkpoint.rows(tasks), checkpoint.saved_routes
    if rows is None or table is None or not tasks:
        return None
    values = {k: v for k, v in checkpoint.description["config"].items() if k != "granularity"}
    config = MHRConfig.from_dict(values)
    weights = skill_weights(rows.view(-1, *table.shape), config, training=False)
    return anneal(weights, float(checkpoint.description.get("anneal_progress", 0.0)))


def route_similarity(weights: Tensor) -> Tensor:
    """How alike tasks are routed: cosine between their centred weights.

    Args:
        weights: `[T, N, H, K]`.

    Returns:
        `[T, T]`, in -1 to 1. The mean over tasks is taken out first: what all tasks share says
        nothing of which are alike.
    """
    flat = weights.flatten(1)
    flat = flat - flat.mean(0, keepdim=True)
    flat = torch.nn.functional.normalize(flat, dim=-1)
    return flat @ flat.t()


def routing_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of a task's mixtures, `[T]`, as a share of that of the uniform mixture."""
    skills = weights.shape[-1]
    if skills == 1:
        return torch.zeros(len(weights))
    share = weights.clamp_min(1e-12)
    entropy = -(share * share.log()).sum(-1) / torch.log(torch.tensor(float(skills)))
    return entropy.mean((1, 2))


def skill_usage(weights: Tensor) -> Tensor:
    """The share that each skill has in a router's mixtures, mean over tasks and heads, `[N, K]`."""
    return weights.mean((0, 2))


def diversity(weights: Tensor, *, over: str) -> Tensor:
    """How different the mixtures are that a task has in its heads, or in its routers, `[T]`.

    The mean, over all pairs of heads of one router (or of routers at one head), of 1 - cos between
    their weights. 0 says that all are the same, as those of Poly over heads; 1 that no two use a
    skill in common. 0 where there is only one.

    Args:
        weights: `[T, N, H, K]`.
        over: `"heads"` or `"routers"`.

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
    """The share of gates that are open, mean of [sigmoid(z) > 1/2], by router, `[N]`.

    This and the two that follow are the monitor of published runs.

    Args:
        logits: `[T, N, H, K]`.
    """
    return (logits > 0).float().mean((0, 2, 3))


def gate_discreteness(logits: Tensor) -> Tensor:
    """How undecided gates are: mean entropy in bits of a coin with p = sigmoid(z), `[N]`.

    1 where every gate is half open, 0 where all are open or shut.

    Args:
        logits: `[T, N, H, K]`.
    """
    z = logits.double()
    open_, shut = z.sigmoid(), (-z).sigmoid()
    log = torch.nn.functional.logsigmoid
    entropy: Tensor = -(open_ * log(z) + shut * log(-z)) / math.log(2)
    return entropy.mean((0, 2, 3)).float()


def gate_efficiency(logits: Tensor) -> Tensor:
    """How evenly all tasks together use the gates of a router, `[N]`, in 0 to 1.

    The entropy of the mean over tasks of sigmoid(z), scaled to sum to one over the H * K gates of
    a row, as a share of log(H * K); 1 where there is one gate.

    Args:
        logits: `[T, N, H, K]`.
    """
    gates = logits.double().sigmoid().mean(0).flatten(1)
    if gates.shape[1] == 1:
        return torch.ones(len(gates))
    share = gates / gates.sum(1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(1)
    return (entropy / math.log(gates.shape[1])).float()


@dataclass(frozen=True)
class CategoryRelation:
    """Whether tasks of one category are routed alike."""

    tasks: int
    """How many have a category; the others are left out."""
    categories: int
    ari: float
    """Adjusted Rand index of the clusters by route, cut to as many as there are categories: 1 where
    they are the categories, about 0 by chance."""
    purity: float
    """Share of tasks whose nearest task by route is of their category."""
    chance: float
    """What a task drawn at random in its place would give, exactly: the mean over tasks of the
    share of the other tasks that are of their category."""
    p: float
    """Share of 10,000 random exchanges of categories, and of this one, that are as pure."""


def relate_to_categories(
    similarity: Tensor, categories: Sequence[str], *, seed: int = 0
) -> CategoryRelation | None:
    """Compare what routes say of tasks with what their categories say.

    Args:
        similarity: `[T, T]`, as of `route_similarity`.
        categories: of each task; empty where it has none.
        seed: of the exchanges that `p` counts.

    Returns:
        None where fewer than two categories are left, or no category has two tasks.
    """
    from scipy.cluster.hierarchy import fcluster
    from sklearn.metrics import adjusted_rand_score

    known = [i for i, category in enumerate(categories) if category]
    names, labels = np.unique([categories[i] for i in known], return_inverse=True)
    count, sizes = len(known), np.bincount(labels)
    if len(names) < 2 or len(names) == count:
        return None
    near = similarity[known][:, known]
    clusters = fcluster(_linkage(near), len(names), "maxclust")
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


def _linkage(similarity: Tensor) -> Floats:
    """The merges `[T - 1, 4]` of average linkage on 1 - cos, in the form of scipy."""
    from scipy.cluster.hierarchy import linkage

    i, j = np.triu_indices(len(similarity), 1)
    distances = 1 - similarity.double().clamp(-1, 1).numpy()[i, j]
    # Ordered so that neighbouring leaves are alike; half a second for 500 tasks.
    merges: Floats = linkage(distances, "average", optimal_ordering=True)
    return merges


@dataclass(frozen=True)
class RoutingAnalysis:
    """How the tasks of an inventory use its skills; all values are those of JSON."""

    tasks: list[str]
    """The first 500 of the inventory."""
    routers: list[str]
    weights: list[list[float]]
    """Of each task, the share of each skill, mean over routers and heads."""
    usage: list[list[float]]
    """Of each router, the share of each skill; see `skill_usage`."""
    overall_usage: list[float]
    """The share of each skill, mean over routers."""
    entropy: list[float]
    """Of each task; see `routing_entropy`."""
    head_diversity: list[float]
    """Of each task; see `diversity`."""
    router_diversity: list[float]
    sparsity: list[float]
    """Of each router, as the next two; see `gate_sparsity`."""
    discreteness: list[float]
    efficiency: list[float]
    similarity: list[list[float]]
    """Of tasks with tasks; see `route_similarity`."""
    linkage: list[list[float]]
    """The dendrogram by average linkage on 1 - similarity: each row merges two clusters (tasks
    count from 0, merged ones on from T) at a distance, into one of a size."""
    order: list[int]
    """The tasks as they stand under the dendrogram."""
    categories: list[str] | None
    """Of each task, empty where it has none."""
    relation: CategoryRelation | None
    """None without categories, or where they say nothing; see `relate_to_categories`."""

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def analyse(checkpoint: Checkpoint, categories: Mapping[str, str] | None = None) -> RoutingAnalysis:
    """Everything that a saved inventory says of its routing, without its base model.

    Args:
        checkpoint: the inventory.
        categories: of its tasks, by name; some may be missing.

    Raises:
        InputError: its tasks have no routes, or there is only one.
    """
    from scipy.cluster.hierarchy import leaves_list

    tasks = list(checkpoint.tasks[:LISTED])
    weights, rows = saved_weights(checkpoint, tasks), checkpoint.rows(tasks)
    if weights is None or rows is None:
        method = checkpoint.description["config"]["method"]
        raise InputError(
            f"there is no routing to analyse: the tasks of this {method!r} inventory have no routes"
        )
    if len(tasks) < 2:
        raise InputError("there is only one task: an analysis of routing compares several")
    logits = rows.view(weights.shape)
    similarity = route_similarity(weights)
    merges = _linkage(similarity)
    usage = skill_usage(weights)
    named = None if categories is None else [categories.get(task, "") for task in tasks]
    return RoutingAnalysis(
        tasks=tasks,
        routers=[str(router) for router in checkpoint.description["routers"]],
        weights=weights.mean((1, 2)).tolist(),
        usage=usage.tolist(),
        overall_usage=usage.mean(0).tolist(),
        entropy=routing_entropy(weights).tolist(),
        head_diversity=diversity(weights, over="heads").tolist(),
        router_diversity=diversity(weights, over="routers").tolist(),
        sparsity=gate_sparsity(logits).tolist(),
        discreteness=gate_discreteness(logits).tolist(),
        efficiency=gate_efficiency(logits).tolist(),
        similarity=similarity.tolist(),
        linkage=merges.tolist(),
        order=leaves_list(merges).tolist(),
        categories=named,
        relation=None if named is None else relate_to_categories(similarity, named),
    )


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """An account of a saved inventory, as text, without its base model."""
    description = checkpoint.description
    config, sites, tasks = description["config"], description["sites"], checkpoint.tasks
    skills = sum(t.numel() for t in checkpoint.skills.values())
    table = checkpoint.saved_routes
    rows = 0 if table is None else len(tasks) * table.width
    count = description["num_skills"]
    lines = [
        f"{config['method']} {config['adapter']} for {description['base']['class']} "
        f"({description['base']['name'] or 'unnamed'})",
        f"  {len(sites)} adapted layers, {len(description['routers'])} routers, "
        f"{config['num_heads']} heads, rank {config['rank']}",
        f"  {count} skills with {skills:,} parameters; one adapter is {skills // max(count, 1):,}",
        f"  routing table of {len(tasks)} tasks with {rows:,} parameters",
    ]
    if len(tasks) > LISTED:
        lines.append(f"  of the first {LISTED} tasks:")
        tasks = tasks[:LISTED]
    weights = saved_weights(checkpoint, tasks)
    if weights is None:
        return "\n".join([*lines, "  tasks: " + ", ".join(tasks)])
    return "\n".join([*lines, *_usage(weights), *_neighbours(weights, tasks)])


def _usage(weights: Tensor) -> list[str]:
    usage = ", ".join(f"{share:.2f}" for share in weights.mean((0, 1, 2)).tolist())
    entropy = float(routing_entropy(weights).mean())
    return [
        f"  mean share of each skill: {usage}",
        f"  entropy of the mixtures: {entropy:.3f} of the uniform mixture's",
    ]


def _neighbours(weights: Tensor, tasks: Sequence[str]) -> list[str]:
    if len(tasks) < 2:
        return ["  task: " + ", ".join(tasks)]
    similarity = route_similarity(weights).fill_diagonal_(-2)
    width = max(map(len, tasks))
    lines = ["  nearest task by route (cosine):"]
    for i, task in enumerate(tasks):
        near = int(similarity[i].argmax())
        lines.append(f"    {task:{width}s}  {tasks[near]} ({float(similarity[i, near]):.2f})")
    return lines
