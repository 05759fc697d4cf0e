"""What an inventory has learned: how tasks use its skills, and which tasks are alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyroute.checkpoint import Checkpoint
from polyroute.config import MHRConfig
from polyroute.routing import anneal, skill_weights

__all__ = ["describe_checkpoint", "route_similarity", "routing_entropy", "saved_weights"]

LISTED = 500
"""An account of more tasks would be read by nobody, and compares each with each."""


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
