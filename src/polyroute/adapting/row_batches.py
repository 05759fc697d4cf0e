"""Losses of several small batches, each routed as one task, computed together in few forwards."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.kinds.objectives import term_weights
from polyroute.model import RoutedModel

__all__ = ["losses_of"]

LENGTH_STEP = 8
"""Lengths are compared in steps of so many tokens; rows of one step are ordered by batch."""
Piece = tuple[int, Row, list[float]]
"""The number of a batch, one of its rows, and the weights of the terms of the batch's loss."""


def losses_of(
    model: RoutedModel,
    kind: ModelKind,
    batches: Sequence[tuple[str, Sequence[Row]]],
    tokens: int,
    *,
    backward: bool = False,
) -> list[float]:
    """The loss of each batch: up to rounding, what it would be alone.

    Args:
        model: the routed model.
        kind: how it learns.
        batches: for each batch, the task that it is routed as and its rows.
        tokens: most tokens in one forward, padding included.
        backward: whether to add the gradients of the sum of all losses, too.

    Returns:
        A loss for each batch, in their order.

    Raises:
        InputError: a row cannot be learned from; see `ModelKind.collate`.
    """
    pieces: list[Piece] = []
    for number, (route, rows) in enumerate(batches):
        weights = term_weights(kind.row_counts(rows))
        pieces += [(number, {**row, "task": route}, weights) for row in rows]
    order: list[int] = []
    parts: list[Tensor] = []
    is_apart = any(site.sees_token_subsets for site in model.sites)
    for chunk in _cut(kind, pieces, tokens, is_apart=is_apart):
        rows = [row for _, row, _ in chunk]
        terms_BT = kind.row_losses(model, kind.collate(rows))
        weighted = (terms_BT * torch.tensor([w for *_, w in chunk], device=terms_BT.device)).sum(1)
        if backward:
            weighted.sum().backward()  # type: ignore[no-untyped-call]
        order += [number for number, *_ in chunk]
        parts.append(weighted.detach())
    sums = np.zeros(len(batches))
    np.add.at(sums, order, torch.cat(parts).cpu().double().numpy())  # one look at the device
    found: list[float] = sums.tolist()
    return found


def _cut(
    kind: ModelKind, pieces: Sequence[Piece], tokens: int, *, is_apart: bool
) -> Iterator[list[Piece]]:
    """Cut rows of similar length into forwards with at most `tokens` tokens, padding included.

    A longer row gets a forward of its own. With `is_apart` a forward has rows of one batch only.
    """
    shaped = [(kind.row_shape(row), (number, row, weights)) for number, row, weights in pieces]

    def place(entry: tuple[Any, Piece]) -> tuple[int, int, int]:
        (_, lengths, _), (number, *_) = entry
        return (number if is_apart else 0, -(sum(lengths) // LENGTH_STEP), number)

    chunk: list[Piece] = []
    times = 0
    longest: tuple[int, ...] = ()
    common: dict[Any, int] = {}
    for (copies, lengths, shared), piece in sorted(shaped, key=place):
        wider = tuple(map(max, lengths, longest)) if longest else lengths
        together = {**common, **shared}
        size = (times + copies) * sum(wider) + len(together) * max(together.values(), default=0)
        if chunk and (size > tokens or (is_apart and chunk[0][0] != piece[0])):
            yield chunk
            chunk, times, wider, together = [], 0, lengths, dict(shared)
        chunk.append(piece)
        times, longest, common = times + copies, wider, together
    if chunk:
        yield chunk
