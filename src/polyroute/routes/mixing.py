"""Mixing the skills of a stack of layers: they are averaged, stacked, or taken whole.

Shape letters: n layers of the stack, U distinct tasks, H heads, K skills, r rank, D width of a
head's block.
"""

import torch
from torch import Tensor

from polyroute.routes.weighted_sum import WeightedSum

__all__ = ["mix_skills", "pick_skills", "stack_skills"]


def mix_skills(skills: Tensor, w_UnHK: Tensor, sets: Tensor | None) -> Tensor:
    """Average skills by their weights: `[n, H, K, r, D]` to `[n, U, r, H D]`.

    Args:
        skills: the skills of one stack; those of several sets lie one after another.
        w_UnHK: the weights over the skills of one set.
        sets: `[U]`, the set that each task mixes; None mixes all skills.
    """
    n, heads, _, rank, block = skills.shape
    rows, count = w_UnHK.shape[0], w_UnHK.shape[-1]
    w = w_UnHK.permute(1, 2, 0, 3).reshape(n * heads, rows, count).to(skills.dtype)
    if sets is None:
        mixed: Tensor = WeightedSum.apply(w, skills)  # type: ignore[no-untyped-call]
    else:
        own = skills.view(n * heads, -1, count, rank * block).index_select(1, sets)
        mixed = torch.matmul(w.unsqueeze(2), own)
    mixed = mixed.view(n, heads, rows, rank, block).permute(0, 2, 3, 1, 4)
    return mixed.reshape(n, rows, rank, heads * block)


def stack_skills(skills: Tensor, w_UnHK: Tensor, sets: Tensor | None) -> Tensor:
    """Stack weighted skills along the rank: `[n, H, K, r, D]` to `[n, U, K r, H D]`.

    The arguments are those of `mix_skills`.
    """
    n, heads, _, rank, block = skills.shape
    rows, count = w_UnHK.shape[0], w_UnHK.shape[-1]
    if sets is None:
        own = skills.unsqueeze(2)
    else:
        own = skills.view(n, heads, -1, count, rank, block).index_select(2, sets)
    w_nHUK = w_UnHK.permute(1, 2, 0, 3).to(skills.dtype)
    weighted = w_nHUK[..., None, None] * own  # [n, H, U, K, r, D]
    return weighted.permute(0, 2, 3, 4, 1, 5).reshape(n, rows, count * rank, heads * block)


def pick_skills(skills: Tensor, sets: Tensor, scale: float) -> Tensor:
    """Take one skill whole for each task: `[n, H, K, r, D]` to `[n, U, r, H D]`.

    Args:
        skills: the skills of one stack.
        sets: `[U]`, the skill that each task takes.
        scale: the factor that the result is multiplied by.
    """
    picked = skills.index_select(2, sets)
    n, heads, rows, rank, block = picked.shape
    picked = picked.permute(0, 2, 3, 1, 4).reshape(n, rows, rank, heads * block)
    return picked * scale if scale != 1.0 else picked
