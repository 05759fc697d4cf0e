"""How a layer applies its factors: one function per case, each computing base(x) + x a^T b.

The shape of the factors decides which executor applies them:

- one task in the batch: factors `[r, d]`, one 2-D product for all tokens of all examples;
- several tasks: factors `[B, r, d]`, one batched product over the examples;
- several tasks in packed rows of several lengths: factors `[B, r, d]`, one 2-D product with the
  ranks of all examples, of which each token keeps those of its own example; or, where these are too
  many, one 2-D product for each example.

`polyroute.layer.gated` has the executors for weights that differ from token to token, and
`polyroute.layer.few_vectors` those for few vectors of 16 bits on CPUs, which look factors up.

If the base layer is an ordinary frozen linear layer, `LinearLoRA`, `LinearLoRAPerExample` and
`LinearLoRAPacked` compute the whole layer. They add the update in place to the fresh output, and in
backward to the fresh input gradient, which saves one pass over the activations each way. Anything
else (quantised layers, autocast, dropout, compiled code) takes the plain path. docs/design.md,
"Executors", gives the measurements behind these choices.

Shape letters: B examples, N tokens, M tokens of one example, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 (its name everywhere)

from polyroute.layer.few_vectors import Places, add_to_few, can_look_up, is_few
from polyroute.layer.segments import Segments
from polyroute.layer.sites import weight_matrix

__all__ = [
    "apply_kept_lora",
    "apply_lora",
    "plain_executors",
    "widened",
]

JOINED = {torch.float32: 0.1, torch.float64: 0.1}
"""By type, how many times the work of the base layer joined products of packed rows may be."""
JOINED_OTHERWISE = 0.75
"""The same for 16-bit types, whose large products are fast, and for all types on accelerators,
where each product of a loop has to be started."""


BLOCKS = 8
"""Without gradients, packed rows of no more blocks of single tokens and of longer examples are
computed block by block."""
_plain_only = False


@contextmanager
def plain_executors() -> Iterator[None]:
    """Make every layer of the process take the plain path, to compare results and times."""
    global _plain_only
    before, _plain_only = _plain_only, True
    try:
        yield
    finally:
        _plain_only = before


def _down(x: Tensor, a: Tensor) -> Tensor:
    """The product x a^T, `[..., N, r]`, in the memory layout that computes faster."""
    product, narrow = (torch.mm, 8) if a.dim() == 2 else (torch.bmm, 16)
    if a.shape[-2] < narrow and a.is_cpu and a.dtype == torch.float32:
        return product(a, x.mT).mT  # for the measurement see docs/design.md, "Executors"
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
    """The same with factors of each example: x `[B, M, d_in]`, a `[B, r, d_in]`, b likewise."""

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


class LinearLoRAPacked(torch.autograd.Function):
    """The same for packed rows: x `[N, d_in]`, a `[B, r, d_in]`, b likewise, and the segments."""

    @staticmethod
    def forward(  # noqa: PLR0913 (autograd takes no keywords)
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        segments: Segments,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        z = _add_packed(y, x, a, b, segments)
        ctx.save_for_backward(x, weight, a, b, z)
        ctx.segments = segments
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _backward_once(LinearLoRAPacked, ctx, dy)
        x, weight, a, b, z = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        dx = dy @ weight if need_x else None
        backward = _joined_backward if _joins(x, a, b) else _looped_backward
        da, db = backward(ctx.segments, dy, dx, x, (a, b, z))
        return dx, None, None, da if need_a else None, db if need_b else None, None


def _add_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add (x a^T) b to y in place, as one product or as a batch of them, and return y.

    Args:
        y: `[N, d_out]` or `[B, M, d_out]`.
        x: `[N, d_in]` or `[B, M, d_in]`.
        a: `[r, d_in]` or `[B, r, d_in]`.
        b: `[r, d_out]` or `[B, r, d_out]`, scale included.
    """
    if is_few(x):
        return add_to_few(y, x, a, b)
    z = _down(x, a)
    return y.addmm_(z, b) if a.dim() == 2 else y.baddbmm_(z, b)


def _add_packed(y: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """Add to y `[N, d_out]`, in place, the update of each example of packed rows.

    Args:
        y: what the base layer computed.
        x: its input, `[N, d_in]`.
        a: `[B, r, d_in]`.
        b: `[B, r, d_out]`, scale included.
        segments: where the examples lie.

    Returns:
        The product z of the input with a: `[N, B r]`, where columns of other examples are 0, or
        `[N, r]`.
    """
    if _joins(x, a, b):
        z = _down(x, a.flatten(0, 1)).mul_(segments.owners(x, a.shape[1]))
        y.addmm_(z, b.flatten(0, 1))
        return z
    z = x.new_empty(len(x), a.shape[1])
    for i, (start, end) in enumerate(segments.bounds):
        z[start:end] = _down(x[start:end], a[i])
        y[start:end].addmm_(z[start:end], b[i])
    return z


def _add_blocks(y: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """`_add_packed` block by block, those of one length in a batched product; returns y."""
    for tokens, examples, part in segments.blocks:
        own_y, own_x, own_a, own_b = y[tokens], x[tokens], a[examples], b[examples]
        if part.length is None:
            _add_packed(own_y, own_x, own_a, own_b, part)
        else:
            shape = (len(own_a), part.length, -1)
            _add_update(own_y.view(shape), own_x.view(shape), own_a, own_b)
    return y


Saved = tuple[Tensor, Tensor, Tensor]
"""The factors a and b, and the product z of the input with a."""


def _joins(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether one product with the ranks of all examples beats one product for each example.

    It computes B times what is needed, which is little beside the base layer if ranks and examples
    are few; a product of a few columns is slow however little it computes.
    """
    share = JOINED_OTHERWISE if x.device.type != "cpu" else JOINED.get(x.dtype, JOINED_OTHERWISE)
    (count, rank, d_in), d_out = a.shape, b.shape[-1]
    return count * rank * (d_in + d_out) <= share * d_in * d_out


def _joined_backward(
    segments: Segments, dy: Tensor, dx: Tensor | None, x: Tensor, saved: Saved
) -> tuple[Tensor, Tensor]:
    """The gradients of a and b; that of the input is added to `dx`."""
    a, b, z = saved
    dz = _down(dy, b.flatten(0, 1)).mul_(segments.owners(x, a.shape[1]))
    if dx is not None:
        dx.addmm_(dz, a.flatten(0, 1))
    return (dz.t() @ x).view_as(a), (z.t() @ dy).view_as(b)


def _looped_backward(
    segments: Segments, dy: Tensor, dx: Tensor | None, x: Tensor, saved: Saved
) -> tuple[Tensor, Tensor]:
    """The same, example by example."""
    a, b, z = saved
    da, db = torch.empty_like(a), torch.empty_like(b)
    for i, (start, end) in enumerate(segments.bounds):
        dy_i = dy[start:end]
        dz = _down(dy_i, b[i])
        da[i] = dz.t() @ x[start:end]
        db[i] = z[start:end].t() @ dy_i
        if dx is not None:
            dx[start:end].addmm_(dz, a[i])
    return da, db


def _backward_once(function: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # Called under create_graph=True: the gradients refuse to be differentiated again. `backward`
    # itself is not decorated, because the decorator's no_grad block costs more than a skinny
    # product, in every layer.
    once: Any = once_differentiable(function.backward)
    return once(ctx, dy)  # type: ignore[no-any-return]


def _plain_weights(base: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """W and c if base(x) is exactly x W^T + c with frozen, plain tensors; None otherwise."""
    if _plain_only or torch.compiler.is_compiling():  # the compiler fuses the plain path itself
        return None
    layer_class = type(base)
    if layer_class is not nn.Linear and layer_class.__name__ != "Conv1D":
        return None
    # Read from the dictionary: every forward of every layer comes here, and the attribute look-up
    # of parameters is slow.
    weight = base._parameters.get("weight")
    bias = base._parameters.get("bias")
    if (
        type(weight) is not nn.Parameter
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or not x.dtype == weight.dtype == a.dtype
        or torch.is_autocast_enabled(x.device.type)
        # Hooks and replaced forwards (of offloading or observers) must see the call.
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    ):
        return None
    return (weight if layer_class is nn.Linear else weight_matrix(base)), bias


def apply_lora(
    base: nn.Module,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    dropout: float,
    segments: Segments | None = None,
) -> Tensor:
    """base(x) plus the low-rank update.

    Args:
        base: the frozen layer.
        x: `[..., d_in]`; with per-example factors the leading axes hold the examples in order, each
            with the same number of consecutive vectors.
        a: `[r, d_in]` or `[B, r, d_in]`.
        b: `[r, d_out]` or `[B, r, d_out]`, scale included.
        dropout: probability with which the update's input is dropped; 0 in evaluation.
        segments: where the examples of packed rows lie; used with per-example factors only.
    """
    one_task = a.dim() == 2
    if segments is not None and (one_task or segments.length is not None):
        segments = None  # examples of one length are a batch, packed or not
    is_packed = segments is not None
    rows = (-1, x.shape[-1]) if one_task or is_packed else (a.shape[0], -1, x.shape[-1])
    plain = None if dropout else _plain_weights(base, x, a)
    if plain is not None:
        # Avoid even a view that changes nothing: it costs two nodes of the graph.
        is_flat = x.dim() == len(rows) and (one_task or is_packed or x.shape[0] == a.shape[0])
        flat = x if is_flat else x.reshape(rows)
        y = _whole_layer(flat, *plain, a, b, segments)
        return y if is_flat else y.view(*x.shape[:-1], y.shape[-1])
    y = base(x)
    h = F.dropout(x, dropout) if dropout else x
    h, a, b = widened(x, h, a, b)
    h = h.reshape(rows)
    if one_task:
        delta = F.linear(h, a) @ b
    elif segments is not None and _joins(h, a, b):
        z = F.linear(h, a.flatten(0, 1))
        delta = (z * segments.owners(z, a.shape[1])) @ b.flatten(0, 1)
    elif segments is not None:
        delta = torch.cat(
            [F.linear(h[s:e], a[i]) @ b[i] for i, (s, e) in enumerate(segments.bounds)]
        )
    else:
        delta = torch.bmm(torch.bmm(h, a.transpose(1, 2)), b)
    updated: Tensor = y + delta.view(y.shape).to(y.dtype)
    return updated


def apply_kept_lora(
    base: nn.Module, x: Tensor, a: Tensor, b: Tensor, places: Places
) -> Tensor | None:
    """base(x) plus an update whose factors are looked up, without gradients.

    Args:
        base: the frozen layer.
        x: `[..., d_in]`.
        a: `[S, r, d_in]`.
        b: `[S, r, d_out]`, scale included.
        places: which of them each vector has.

    Returns:
        The output; None where that cannot be done: the layer is not an ordinary one, sees other
        vectors than those with places (of images), or is on another device, or needs a gradient.
    """
    plain = _plain_weights(base, x, a)
    if (
        plain is None
        or not can_look_up(x.device, x.dtype)
        or x.numel() != len(places.begins) * x.shape[-1]
        or (torch.is_grad_enabled() and x.requires_grad)
    ):
        return None
    return add_to_few(F.linear(x, *plain), x, a, b, places)


def _whole_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    segments: Segments | None,
) -> Tensor:
    """The layer and its update computed together, for flat `x`."""
    one_task = a.dim() == 2
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad)
    if segments is not None and not needs_grad and len(segments.blocks) <= BLOCKS:
        return _add_blocks(F.linear(x, weight, bias), x, a, b, segments)
    if segments is not None:
        packed: Tensor = LinearLoRAPacked.apply(x, weight, bias, a, b, segments)  # type: ignore[no-untyped-call]
        return packed
    if needs_grad:
        function = LinearLoRA if one_task else LinearLoRAPerExample
        y: Tensor = function.apply(x, weight, bias, a, b)  # type: ignore[no-untyped-call]
        return y
    return _add_update(F.linear(x, weight, bias), x, a, b)


def widened(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Tensors that meet the input `x` of a layer, cast to the widest type among them and `x`.

    Autocast casts them itself, unless `x` is float64. Types differ because some models keep single
    layers in fp32.
    """
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return list(tensors)
    wide = x.dtype
    for tensor in tensors:
        if tensor.dtype != wide:
            wide = torch.promote_types(wide, tensor.dtype)
    return [tensor if tensor.dtype == wide else tensor.to(wide) for tensor in tensors]
