"""The equations of Poly and MHR, by plain loops in float64. Nothing of polyroute is used here.

Skills are in the published layout: A `[H, K, d_in/H, r]`, B `[H, K, r, d_out/H]`, l
`[H, K, 1, d_out/H]`; logits and weights of one task and one router are `[H, K]`.
"""

import math

import torch
from torch import Tensor


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def weights(z: Tensor) -> Tensor:
    """w[h, k] = sigmoid(z[h, k]) / sum_j sigmoid(z[h, j])."""
    heads, skills = z.shape
    rows = []
    for h in range(heads):
        gates = [sigmoid(z[h, k]) for k in range(skills)]
        total = sum(gates[1:], start=gates[0])
        rows.append(torch.stack([gate / total for gate in gates]))
    return torch.stack(rows)


def uniform(heads: int, skills: int) -> Tensor:
    return torch.full((heads, skills), 1 / skills, dtype=torch.float64)


def mix(skills: Tensor, w: Tensor, axis: int) -> Tensor:
    """sum_k w[h, k] skills[h, k] for each head; the heads' blocks joined along `axis`."""
    blocks = []
    for h in range(skills.shape[0]):
        block = torch.zeros_like(skills[h, 0])
        for k in range(skills.shape[1]):
            block = block + w[h, k] * skills[h, k]
        blocks.append(block)
    return torch.cat(blocks, dim=axis)


def lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, w: Tensor, scale: float
) -> Tensor:
    """One example: y = W x + c + alpha/r (x A) B, for each of its vectors x."""
    mixed_a, mixed_b = mix(a, w, axis=0), mix(b, w, axis=1)
    rows = []
    for vector in x.reshape(-1, x.shape[-1]):
        y = weight @ vector + scale * (vector @ mixed_a) @ mixed_b
        rows.append(y if bias is None else y + bias)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def ia3(x: Tensor, weight: Tensor, bias: Tensor | None, skills: Tensor, w: Tensor) -> Tensor:
    """One example: y = (W x + c) * l, for each of its vectors x."""
    mixed = mix(skills, w, axis=1)[0]
    rows = []
    for vector in x.reshape(-1, x.shape[-1]):
        y = weight @ vector
        rows.append((y if bias is None else y + bias) * mixed)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def gate_mean(z: float, draws: int = 200_000) -> float:
    """E[sigmoid(z + log u - log(1 - u))] by the midpoint rule over u."""
    total = 0.0
    for i in range(draws):
        u = (i + 0.5) / draws
        total += 1 / (1 + math.exp(-(z + math.log(u) - math.log(1 - u))))
    return total / draws
