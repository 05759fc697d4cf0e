"""Weights: from a task's row of logits to the share that each skill has in its mixture.

Shape letters: U rows (of distinct tasks, or of examples if gates are noisy), N routers, H heads,
K skills.
"""

import math

import torch
from torch import Tensor

from polyroute.config import MHRConfig

__all__ = ["anneal", "skill_weights", "uniform_weights"]

EPSILON = 1e-12


def skill_weights(logits: Tensor, config: MHRConfig, *, training: bool) -> Tensor:
    """Turn routing logits into mixing weights, in the order of the published method.

        w_k = sigmoid(z_k) / sum_j sigmoid(z_j)

    This is Poly (Ponti et al., 2022) and, for each head, MHR (Caccia et al., 2023).
    The variants of `MHRConfig` replace the sigmoid (`gate`), drop gates (`logit_dropout`), switch
    the last skill on (`shared_skill`) or replace the normaliser (`normalization`). Noise acts in
    training only.

    Args:
        logits: `[U, N, H, K]`, fp32 or fp64.
        config: `gate`, `logit_dropout`, `shared_skill` and `normalization` are read.
        training: whether noise and dropout act.

    Returns:
        Weights `[U, N, H, K]`. With `normalization="sum"` they are non-negative and sum to one over
        K; if every gate is zero, the weights are zero and not NaN.
    """
    if config.normalization == "none":
        return logits
    if config.normalization == "l2":
        return torch.nn.functional.normalize(logits, dim=-1, eps=EPSILON)
    is_plain = config.gate == "sigmoid" and not config.shared_skill and not config.logit_dropout
    if is_plain and config.normalization == "sum":
        # The same quotient in log space: with very negative logits the plain one would not sum to
        # one, or would be 0/0 in low precision.
        return torch.softmax(torch.nn.functional.logsigmoid(logits), dim=-1)
    gates = _gates(logits, config, training=training)
    if config.logit_dropout:
        gates = torch.nn.functional.dropout(gates, config.logit_dropout, training)
    if config.shared_skill:
        gates = torch.cat([gates[..., :-1], torch.ones_like(gates[..., -1:])], dim=-1)
    if config.normalization == "average_correction":
        heads, skills = logits.shape[-2:]
        return gates * math.sqrt(heads / skills)
    return gates / (gates.sum(-1, keepdim=True) + EPSILON)


def _gates(logits: Tensor, config: MHRConfig, *, training: bool) -> Tensor:
    if config.gate == "relaxed_bernoulli" and training:
        uniform = torch.rand_like(logits).clamp(EPSILON, 1 - 1e-7)
        return torch.sigmoid(logits + torch.log(uniform) - torch.log1p(-uniform))
    probability = torch.sigmoid(logits)
    if config.gate == "straight_through":
        return probability + (probability.round() - probability).detach()
    return probability


def uniform_weights(like: Tensor) -> Tensor:
    """Weights of the uniform mixture (Poly-mu, MHR-mu), shaped as `like`."""
    return torch.full_like(like, 1.0 / like.shape[-1])


def anneal(weights: Tensor, progress: float) -> Tensor:
    """Move weights toward the uniform mixture.

        w <- a w + (1 - a) / K,   a = cos(pi / 2 * progress)

    Args:
        weights: `[..., K]`.
        progress: 0 leaves the weights, 1 gives the uniform mixture.
    """
    a = math.cos(math.pi / 2 * progress)
    return a * weights + (1 - a) / weights.shape[-1]
