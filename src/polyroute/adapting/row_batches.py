"""Losses of several small batches, each routed as one task, computed together in few forwards."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.kinds.objectives import term_weights
from polyroute.kinds.packing import Packing
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
    packing: Packing | None = None,
) -> list[float]:
    """The loss of each batch: up to rounding, what it would be alone.

    Args:
        model: the routed model.
        kind: how it learns.
        batches: for each batch, the task that it is routed as and its rows.
        tokens: most tokens in one forward, padding included.
        backward: whether to add the gradients of the sum of all losses, too.
        packing: how rows are packed; see `ModelKind.packing_of`.

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
    if packing is None:
        cut = _cut_padded(kind, pieces, tokens, is_apart=is_apart)
    else:
        cut = _cut_packed(kind, pieces, tokens, packing, is_apart=is_apart)
    for chunk, batch in cut:
        terms_BT = kind.row_losses(model, batch)
        weighted = (terms_BT * torch.tensor([w for *_, w in chunk], device=terms_BT.device)).sum(1)
        if backward:
            weighted.sum().backward()  # type: ignore[no-untyped-call]
        order += [number for number, *_ in chunk]
        parts.append(weighted.detach())
    sums = np.zeros(len(batches))
    np.add.at(sums, order, torch.cat(parts).cpu().double().numpy())  # one look at the device
    found: list[float] = sums.tolist()
    return found


def _cut_packed(
    kind: ModelKind, pieces: Sequence[Piece], tokens: int, packing: Packing, *, is_apart: bool
) -> Iterator[tuple[list[Piece], dict[str, Any]]]:
    """Cut rows into packed forwards with at most `tokens` tokens.

    Packing leaves little padding whatever the lengths are, so the rows of a batch stay together.
    """

    def packed(count: int) -> tuple[dict[str, Any], int]:
        batch = kind.collate_packed([row for _, row, _ in left[:count]], packing)
        return batch, batch["input_ids"].numel()

    for group, limit in _together(kind, pieces, tokens, is_apart=is_apart):
        left = group
        while left:
            totals = itertools.accumulate(_length(kind, piece) for piece in left)
            count = max(1, sum(1 for _ in itertools.takewhile(limit.__ge__, totals)))
            batch, size = packed(count)
            while count > 1 and size > tokens:  # some padding is left
                count -= 1
                batch, size = packed(count)
            while (more := min(len(left), count * limit // size)) > count:  # they share tokens
                larger, size = packed(more)
                if size > tokens:
                    break
                count, batch = more, larger
            yield left[:count], batch
            left = left[count:]


def _together(
    kind: ModelKind, pieces: Sequence[Piece], tokens: int, *, is_apart: bool
) -> Iterator[tuple[list[Piece], int]]:
    """Rows that may share a forward, and how many of their tokens each forward is to have.

    A batch that fills half a forward has forwards of its own, all of a size: a forward of several
    tasks costs 10 to 18 % more (SmolLM2 in bfloat16 on a CPU), and a larger one saves less. So has
    every batch where a forward can have one task alone (`is_apart`).
    """
    small: list[Piece] = []
    for _, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        rows = list(group)
        total = sum(_length(kind, piece) for piece in rows)
        if 2 * total < tokens and not is_apart:
            small += rows
        else:
            longest = max(_length(kind, piece) for piece in rows)
            yield rows, min(tokens, total // -(-total // tokens) + longest)
    if small:
        yield small, tokens


def _length(kind: ModelKind, piece: Piece) -> int:
    copies, lengths, _ = kind.row_shape(piece[1])
    return copies * sum(lengths)


def _cut_padded(
    kind: ModelKind, pieces: Sequence[Piece], tokens: int, *, is_apart: bool
) -> Iterator[tuple[list[Piece], dict[str, Any]]]:
    """The forwards of `_similar`, collated."""
    for chunk in _similar(kind, pieces, tokens, is_apart=is_apart):
        yield chunk, kind.collate([row for _, row, _ in chunk])


def _similar(
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
