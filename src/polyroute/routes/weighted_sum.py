"""The weighted sum of skills, which reuses the memory of its large gradient.

Shape letters: n layers of a stack, U distinct tasks, H heads, K skills, r rank, D width of a head's
block.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["WeightedSum"]


class WeightedSum(torch.autograd.Function):
    """Weights `[n H, U, K]` times skills `[n, H, K, r, D]`, to `[n H, U, r D]`.

    The gradient of this batched product is as large as all skills together. On a CPU, page faults
    in new memory of that size cost several times the arithmetic, so the memory is reused.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, skills: Tensor) -> Tensor:
        """One batched product."""
        ctx.save_for_backward(w, skills)
        return torch.bmm(w, skills.reshape(*w.shape[::2], -1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Two batched products; the second one may write to reused memory."""
        w, skills = ctx.saved_tensors
        need_w, need_skills = ctx.needs_input_grad
        dw = torch.bmm(dy, skills.reshape(*w.shape[::2], -1).mT) if need_w else None
        if not need_skills:
            return dw, None
        if torch.is_grad_enabled() or not skills.is_cpu or type(skills) is not nn.Parameter:
            return dw, torch.bmm(w.mT, dy).view(skills.shape)
        out = _recycled(skills)
        torch.bmm(w.mT, dy, out=out.view(*w.shape[::2], -1))
        return dw, out


_last_gradients: MutableMapping[Tensor, torch.UntypedStorage] = WeakTensorKeyDictionary()
"""The memory of the last gradient of each stack of skills."""


def _recycled(skills: Tensor) -> Tensor:
    """An uninitialised tensor shaped as the skills, in the memory of the last gradient if possible.

    The memory is free when no tensor refers to it any more, as after `zero_grad()`; a caller who
    still holds the last gradient keeps it. The entry is taken out first, so two threads never get
    the same memory.
    """
    memory = _last_gradients.pop(skills, None)
    if (
        memory is None
        or memory.nbytes() != skills.numel() * skills.element_size()
        or torch._C._storage_Use_Count(memory._cdata) > 1
    ):
        memory = skills.new_empty(skills.numel()).untyped_storage()
    _last_gradients[skills] = memory
    return skills.new_empty(0).set_(memory).view(skills.shape)
