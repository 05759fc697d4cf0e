"""What an inventory has learned: how tasks use its skills, and which tasks are alike."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.routes.weights import anneal, skill_weights
from polyroute.saved.checkpoint import Checkpoint
from polyroute.study.categories import CategoryRelation, linkage_of, relate_to_categories
from polyroute.study.routing_measures import (
    diversity,
    gate_discreteness,
    gate_efficiency,
    gate_sparsity,
    route_similarity,
    routing_entropy,
    skill_usage,
)

__all__ = ["RoutingAnalysis", "analyse", "describe_checkpoint", "saved_weights"]

LISTED = 500
"""Most tasks of an analysis: nobody would read more, and each task is compared with every other."""


def saved_weights(checkpoint: Checkpoint, tasks: Sequence[str] | None = None) -> Tensor | None:
    """The mixing weights of tasks in evaluation.

    Args:
        checkpoint: the inventory.
        tasks: names of tasks; by default all.

    Returns:
        `[tasks, routers, heads, skills]`; None if the tasks are not routed, or there is no task.
    """
    tasks = checkpoint.tasks if tasks is None else tasks
    rows, table = checkpoint.rows(tasks), checkpoint.saved_routes
    if rows is None or table is None or not tasks:
        return None
    values = {k: v for k, v in checkpoint.description["config"].items() if k != "granularity"}
    config = MHRConfig.from_dict(values)
    weights = skill_weights(rows.view(-1, *table.shape), config, training=False)
    return anneal(weights, float(checkpoint.description.get("anneal_progress", 0.0)))


@dataclass(frozen=True)
class RoutingAnalysis:
    """How the tasks of an inventory use its skills; all values are JSON values."""

    tasks: list[str]
    """The first 500 tasks of the inventory."""
    routers: list[str]
    """Names of the routers."""
    weights: list[list[float]]
    """For each task the share of each skill, as a mean over routers and heads."""
    usage: list[list[float]]
    """For each router the share of each skill; see `skill_usage`."""
    overall_usage: list[float]
    """The share of each skill, as a mean over routers."""
    entropy: list[float]
    """For each task; see `routing_entropy`."""
    head_diversity: list[float]
    """For each task, over its heads; see `diversity`."""
    router_diversity: list[float]
    """For each task, over its routers; see `diversity`."""
    sparsity: list[float]
    """For each router; see `gate_sparsity`."""
    discreteness: list[float]
    """For each router; see `gate_discreteness`."""
    efficiency: list[float]
    """For each router; see `gate_efficiency`."""
    similarity: list[list[float]]
    """Between all tasks; see `route_similarity`."""
    linkage: list[list[float]]
    """The dendrogram by average linkage on 1 - similarity. Each row merges two clusters and holds
    their numbers, their distance and the size of the merged one; tasks are clusters 0 to T - 1, and
    merged clusters count on from T."""
    order: list[int]
    """The tasks as they stand under the dendrogram."""
    categories: list[str] | None
    """The category of each task, empty where it has none."""
    relation: CategoryRelation | None
    """None without categories, or where they cannot be compared; see `relate_to_categories`."""

    def to_dict(self) -> dict[str, Any]:
        """The analysis as a JSON object."""
        return asdict(self)


def analyse(checkpoint: Checkpoint, categories: Mapping[str, str] | None = None) -> RoutingAnalysis:
    """Everything that a saved inventory tells about its routing; the base model is not needed.

    Args:
        checkpoint: the inventory.
        categories: the categories of its tasks, by the name of the task; some may be missing.

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
    merges = linkage_of(similarity)
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
    """A description of a saved inventory, as text; the base model is not needed."""
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
