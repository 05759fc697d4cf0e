"""Rows of the routing table that mix skills alike."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from polyroute.config import MHRConfig
from polyroute.routes.weights import skill_weights

__all__ = ["nearest_rows"]

COMPARED_AT_ONCE = 2**22
"""The most numbers of the table that are copied at any time."""


@torch.no_grad()
def nearest_rows(
    logits: Tensor, row: Tensor, own: int, config: MHRConfig, k: int
) -> list[tuple[int, float]]:
    """The rows of a table that mix skills most like a given row.

    Weights are compared, not logits, because only weights have an effect: where the sigmoid is
    flat, very different logits give nearly the same weights. The mean over all rows is subtracted
    first, because what all tasks have in common does not tell them apart.

    Args:
        logits: the table, `[T, N, H, K]`.
        row: the logits `[N, H, K]` that the rows are compared with.
        own: the number of that row in the table, which is left out; -1 if it is not in the table.
        config: decides which weights logits give.
        k: the largest number of rows to return.

    Returns:
        Up to k pairs of a row number and a cosine in -1 to 1, best first.
    """
    count = len(logits) - (own >= 0)
    if count < 1:
        return []

    def weights(rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        return skill_weights(rows.to(wide), config, training=False).flatten(1)

    chunks = torch.split(logits, max(1, COMPARED_AT_ONCE // row.numel()))
    total = torch.zeros(row.numel(), dtype=torch.float64)  # on the CPU: MPS has no float64
    for chunk in chunks:
        total += weights(chunk).mean(0).cpu().double() * len(chunk)
    weights_1W = weights(row.unsqueeze(0))
    mean = (total / len(logits)).to(weights_1W)
    query = normalize(weights_1W - mean, dim=-1)[0]
    found = torch.cat([normalize(weights(chunk) - mean, dim=-1) @ query for chunk in chunks])
    found.clamp_(-1.0, 1.0)  # rounding may exceed the bounds
    if own >= 0:
        found[own] = -torch.inf
    best = found.topk(min(k, count))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
