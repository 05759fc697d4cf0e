"""How a layer applies its factors: one function per case, all computing base(x) + x a^T b.

The executor follows from the shape of the factors:

- one task in the batch: factors `[r, d]`, all tokens of all examples in one 2-D product;
- several: factors `[B, r, d]`, one batched product over examples;
- a mixture for each token: the skills themselves, mixed in the space of the activations.

Where the base layer is an ordinary frozen linear layer, `LinearLoRA` and `LinearLoRAPerExample`
compute the whole layer: the update is added in place to the fresh output, and in backward to the
fresh input gradient, which saves one pass over the activations each way. Anything else (quantised
layers, autocast, dropout, compiled code) takes the plain path. The rule and its measurements are in
docs/design.md, "Executors".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 (its name everywhere)

from polyroute.layer.sites import weight_matrix

__all__ = ["apply_ia3", "apply_lora", "apply_token_lora", "plain_executors"]

_plain_only = False


@contextmanager
def plain_executors() -> Iterator[None]:
    """Let every layer take the plain path, to compare results and times; holds for the process."""
    global _plain_only
    before, _plain_only = _plain_only, True
    try:
        yield
    finally:
        _plain_only = before


def _down(x: Tensor, a: Tensor) -> Tensor:
    """The product x a^T, `[..., N, r]`, in the memory layout that is faster to compute."""
    product, narrow = (torch.mm, 8) if a.dim() == 2 else (torch.bmm, 16)
    if a.shape[-2] < narrow and a.is_cpu and a.dtype == torch.float32:
        return product(a, x.mT).mT  # measured: docs/design.md, "Executors"
    return product(x, a.mT)


class LinearLoRA(torch.autograd.Function):
    """y = x W^T + c + (x a^T) b for one task: x `[N, d_in]`, a `[r, d_in]`, b `[r, d_out]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        z = _down(x, a)
        y = F.linear(x, weight, bias).addmm_(z, b)
        ctx.save_for_backward(x, weight, a, b, z)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _backward_once(LinearLoRA, ctx, dy)
        x, weight, a, b, z = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad
        dz = _down(dy, b)
        da = dz.t() @ x if need_a else None
        db = z.t() @ dy if need_b else None
        dx = (dy @ weight).addmm_(dz, a) if need_x else None
        return dx, None, None, da, db


class LinearLoRAPerExample(torch.autograd.Function):
    """The same with factors of their own for each example: x `[B, M, d_in]`, a `[B, r, d_in]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        z = _down(x, a)
        y = F.linear(x, weight, bias).baddbmm_(z, b)
        ctx.save_for_backward(x, weight, a, b, z)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _backward_once(LinearLoRAPerExample, ctx, dy)
        x, weight, a, b, z = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad
        dz = _down(dy, b)
        da = torch.bmm(dz.transpose(1, 2), x) if need_a else None
        db = torch.bmm(z.transpose(1, 2), dy) if need_b else None
        dx = torch.matmul(dy, weight).baddbmm_(dz, a) if need_x else None
        return dx, None, None, da, db


def _backward_once(function: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # Under create_graph=True: gradients that refuse to be differentiated again. The decorator is
    # not on backward itself because its no_grad block costs each layer more than a skinny product.
    once: Any = once_differentiable(function.backward)
    return once(ctx, dy)  # type: ignore[no-any-return]


def _plain_weights(base: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """W and c where base(x) is exactly x W^T + c, frozen and plain, so that we may compute it."""
    if _plain_only or torch.compiler.is_compiling():  # the compiler fuses the plain path itself
        return None
    kind = type(base)
    if kind is not nn.Linear and kind.__name__ != "Conv1D":
        return None
    # From the dictionary: attribute look-up of parameters is slow, and every layer comes by here.
    weight = base._parameters.get("weight")
    bias = base._parameters.get("bias")
    if (
        type(weight) is not nn.Parameter
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or not x.dtype == weight.dtype == a.dtype
        or torch.is_autocast_enabled(x.device.type)
        # Hooks and replaced forwards (offloading, observers) must see the call.
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    ):
        return None
    return (weight if kind is nn.Linear else weight_matrix(base)), bias


def apply_lora(base: nn.Module, x: Tensor, a: Tensor, b: Tensor, dropout: float) -> Tensor:
    """base(x) plus the low-rank update.

    Args:
        base: the frozen layer.
        x: `[..., d_in]`; with per-example factors the leading axes hold the examples in order, each
            repeated or split into the same number of consecutive rows.
        a: `[r, d_in]` or `[B, r, d_in]`.
        b: `[r, d_out]` or `[B, r, d_out]`, scale included.
        dropout: probability with which the update's input is dropped; 0 in evaluation.
    """
    one_task = a.dim() == 2
    rows = (-1, x.shape[-1]) if one_task else (a.shape[0], -1, x.shape[-1])
    plain = None if dropout else _plain_weights(base, x, a)
    if plain is not None:
        weight, bias = plain
        # Even a view that changes nothing is two nodes of the graph.
        is_flat = x.dim() == a.dim() and (one_task or x.shape[0] == a.shape[0])
        flat = x if is_flat else x.reshape(rows)
        if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
            function = LinearLoRA if one_task else LinearLoRAPerExample
            y: Tensor = function.apply(flat, weight, bias, a, b)  # type: ignore[no-untyped-call]
        elif one_task:
            y = F.linear(flat, weight, bias).addmm_(_down(flat, a), b)
        else:
            y = F.linear(flat, weight, bias).baddbmm_(_down(flat, a), b)
        return y if is_flat else y.view(*x.shape[:-1], y.shape[-1])
    y = base(x)
    h = F.dropout(x, dropout) if dropout else x
    if not torch.is_autocast_enabled(x.device.type):
        wide = torch.promote_types(x.dtype, a.dtype)  # some models keep single layers in fp32
        h, a, b = h.to(wide), a.to(wide), b.to(wide)
    h = h.reshape(rows)
    delta = F.linear(h, a) @ b if one_task else torch.bmm(torch.bmm(h, a.transpose(1, 2)), b)
    return y + delta.view(y.shape).to(y.dtype)


def apply_token_lora(
    base: nn.Module, x: Tensor, a: Tensor, b: Tensor, weights: Tensor, dropout: float
) -> Tensor:
    """base(x) plus an update whose mixture is each token's own.

    No factors of a token are ever formed: all skills are applied to its activations, and what they
    give, r numbers a skill, is averaged.

    Args:
        base: the frozen layer.
        x: `[..., d_in]`.
        a: the skills, `[H, K, r, d_in/H]`.
        b: `[H, K, r, d_out/H]`, scale included.
        weights: `[..., H, K]`, those of each token; leading axes may be 1, or missing.
        dropout: as in `apply_lora`.
    """
    y: Tensor = base(x)
    h = F.dropout(x, dropout) if dropout else x
    heads, skills, rank, block = a.shape
    w_NHK = weights.expand(*x.shape[:-1], heads, skills).reshape(-1, heads, skills)
    if not torch.is_autocast_enabled(x.device.type):
        wide = torch.promote_types(x.dtype, a.dtype)
        h, a, b, w_NHK = h.to(wide), a.to(wide), b.to(wide), w_NHK.to(wide)
    w_HNK1 = w_NHK.transpose(0, 1).unsqueeze(-1)
    h_HND = h.reshape(-1, heads, block).transpose(0, 1)
    of_skills = torch.bmm(h_HND, a.reshape(heads, skills * rank, block).mT)
    z_Nr = (w_HNK1 * of_skills.view(heads, -1, skills, rank)).sum((0, 2))
    spread = (w_HNK1 * z_Nr.unsqueeze(1)).view(heads, -1, skills * rank)
    delta_HND = torch.bmm(spread, b.reshape(heads, skills * rank, -1))
    return y + delta_HND.transpose(0, 1).reshape(y.shape).to(y.dtype)


def apply_ia3(base: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """base(x) times a scale for each output unit, bias included ((IA)^3).

    Args:
        base: the frozen layer.
        x: `[..., d_in]`, as in `apply_lora`.
        scale: `[1, d_out]` or `[B, 1, d_out]`.
    """
    y: Tensor = base(x)
    scale = scale.to(y.dtype)
    if scale.dim() == 2:
        return y * scale.squeeze(0)
    return (y.reshape(scale.shape[0], -1, y.shape[-1]) * scale).view(y.shape)
