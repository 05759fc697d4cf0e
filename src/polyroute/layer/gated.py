"""Executors for weights that differ from token to token, or that combine skills in output space.

In *weight space* the factors of the skills are averaged; in *output space* their updates of the
layer's output are averaged:

    weight space    y = base(x) + (x A(w)) B(w),        A(w)[h] = sum_k w[h, k] A[h, k], B alike
    output space    y[h] = base(x)[h] + sum_k w[h, k] (x A_k) B_k[h]

Here h is a head, a block of the output with weights of its own. In output space the skills may have
different ranks. The ranks of all skills lie one after another, and each rank has the weight of its
skill.

Shape letters: N tokens, B examples, H heads, K skills, r rank of a skill, R the ranks of all skills
together, D width of a head's block.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its name everywhere)

from polyroute.layer.kernels import widened
from polyroute.layer.segments import Segments

__all__ = [
    "Gate",
    "apply_output_space",
    "apply_sorted",
    "apply_weight_space",
    "sorting_pays",
    "weights_of_tokens",
]

Gate = Tensor | Callable[[Tensor], Tensor]
"""Weights, or a function that computes them from the layer's input."""

SORTED_FROM = 0.7
"""Sorting is cheaper if the ranks of all skills together exceed this share of the input's width;
for the measurement see docs/design.md, "Executors"."""


def weights_of_tokens(
    gate: Gate, x: Tensor, *, per_example: bool, segments: Segments | None
) -> Tensor:
    """The weights `[N, H, K]` of all tokens of a layer's input.

    Args:
        gate: `[H, K]` for all tokens; `[B, H, K]` if `per_example`; otherwise `[..., H, K]` with
            the leading axes of `x`, any of which may be 1; or a function of `x` that returns
            weights of one of these shapes.
        x: `[..., d_in]`; the examples are in order, each with the same number of consecutive
            tokens.
        per_example: whether the weights are those of the examples.
        segments: where the examples of packed rows lie.
    """
    weights = gate if isinstance(gate, Tensor) else gate(x)
    shape = weights.shape[-2:]
    count = x.numel() // x.shape[-1]
    if not per_example:
        return weights.expand(*x.shape[:-1], *shape).reshape(count, *shape)
    if segments is not None:
        return segments.spread(weights)
    times = count // len(weights)
    return weights.unsqueeze(1).expand(-1, times, -1, -1).reshape(count, *shape)


def apply_weight_space(
    base: nn.Module, x: Tensor, a: Tensor, b: Tensor, w_NHK: Tensor, dropout: float
) -> Tensor:
    """base(x) plus an update whose factors are averaged for each token.

    The factors of a token are never formed: A of every skill is applied to its activations, and
    the results, r numbers a skill, are averaged.

    Args:
        base: the frozen layer.
        x: `[..., d_in]`.
        a: A of the skills, `[H, K, r, d_in/H]`.
        b: B of the skills, `[H, K, r, d_out/H]`, scale included.
        w_NHK: the weights of each token.
        dropout: probability with which the update's input is dropped.
    """
    y: Tensor = base(x)
    h = F.dropout(x, dropout) if dropout else x
    heads, skills, rank, block = a.shape
    h, a, b, w_NHK = widened(x, h, a, b, w_NHK)
    w_HNK1 = w_NHK.transpose(0, 1).unsqueeze(-1)
    h_HND = h.reshape(-1, heads, block).transpose(0, 1)
    of_skills = torch.bmm(h_HND, a.reshape(heads, skills * rank, block).mT)
    z_Nr = (w_HNK1 * of_skills.view(heads, -1, skills, rank)).sum((0, 2))
    spread = (w_HNK1 * z_Nr.unsqueeze(1)).view(heads, -1, skills * rank)
    delta_HND = torch.bmm(spread, b.reshape(heads, skills * rank, -1))
    return y + delta_HND.transpose(0, 1).reshape(y.shape).to(y.dtype)


def apply_output_space(
    base: nn.Module,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    w_NHR: Tensor,
    dropout: float,
) -> Tensor:
    """base(x) plus the average of the skills' updates for each token: two products over all skills.

    Args:
        base: the frozen layer.
        x: `[..., d_in]`.
        a: all ranks of all skills, `[R, d_in]`.
        b: `[R, d_out]`, scale included.
        w_NHR: for each token, head and rank the weight of the skill that the rank belongs to.
        dropout: probability with which the update's input is dropped.
    """
    y: Tensor = base(x)
    h = F.dropout(x, dropout) if dropout else x
    h, a, b, w_NHR = widened(x, h, a, b, w_NHR)
    z_NR = h.reshape(-1, h.shape[-1]) @ a.t()
    heads = w_NHR.shape[1]
    if heads == 1:
        delta = (z_NR * w_NHR[:, 0]) @ b
    else:
        b_HRD = b.view(len(b), heads, -1).transpose(0, 1)
        delta = torch.bmm(w_NHR.transpose(0, 1) * z_NR, b_HRD).transpose(0, 1)
    return y + delta.reshape(y.shape).to(y.dtype)


def sorting_pays(ranks: int, d_in: int, num_skills: int, top_k: int | None) -> bool:
    """Whether it is cheaper to sort the tokens by skill and to compute skill by skill.

    Args:
        ranks: the ranks of all skills together.
        d_in: the width of the layer's input.
        num_skills: the number of skills.
        top_k: the largest number of skills that a token uses; None if it is not known.
    """
    return top_k is not None and 2 * top_k <= num_skills and ranks > SORTED_FROM * d_in


def apply_sorted(
    base: nn.Module,
    x: Tensor,
    factors: list[tuple[Tensor, Tensor]],
    w_NK: Tensor,
    top_k: int,
    dropout: float,
) -> Tensor:
    """The result of `apply_output_space`, computed skill by skill for the tokens that use it.

    Args:
        base: the frozen layer.
        x: `[..., d_in]`.
        factors: for each skill a `[r, d_in]` and b `[r, d_out]`, scale included.
        w_NK: the weights of each token; at most `top_k` of them are not zero.
        top_k: see `w_NK`.
        dropout: probability with which the update's input is dropped.
    """
    y: Tensor = base(x)
    h = F.dropout(x, dropout) if dropout else x
    h, w_NK, *flat = widened(x, h, w_NK, *(t for pair in factors for t in pair))
    h_ND = h.reshape(-1, h.shape[-1])
    chosen = w_NK.abs().topk(min(top_k, w_NK.shape[-1]), dim=-1).indices
    order = chosen.flatten().argsort(stable=True)
    tokens = order // chosen.shape[-1]
    counts = torch.bincount(chosen.flatten(), minlength=len(factors)).tolist()
    delta = h_ND.new_zeros(len(h_ND), y.shape[-1])
    for skill, rows in enumerate(torch.split(tokens, counts)):
        if len(rows):
            a, b = flat[2 * skill], flat[2 * skill + 1]
            z = h_ND.index_select(0, rows) @ a.t() * w_NK[rows, skill].unsqueeze(-1)
            delta.index_add_(0, rows, z @ b)
    return y + delta.reshape(y.shape).to(y.dtype)
