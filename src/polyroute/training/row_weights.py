"""One loss for a whole step: rows weigh the same however processes and micro-batches share them.

A mean of means is not the mean of a batch whose targets differ in length. So each row says what it
counts for each term of the loss, and is weighed by what all rows of the step count.

Shape letters: B rows, T terms of the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.kinds.objectives import term_weights
from polyroute.kinds.packing import Packing

__all__ = ["collate", "losses_and_counts", "rows_in_batch", "share_of_loss", "weigh"]

COUNTS = "row_counts"
"""Column of a batch: what each row counts for each term of the loss, `[B, T]`."""
WEIGHTS = "step_weights"
"""Column of a batch: what the terms of each row are multiplied with, `[B, T]`."""


def collate(kind: ModelKind, rows: Sequence[Row], packing: Packing | None = None) -> dict[str, Any]:
    """The batch of a kind, with what its rows count."""
    batch = kind.collate(rows) if packing is None else kind.collate_packed(rows, packing)
    return {**batch, COUNTS: torch.tensor(kind.row_counts(rows))}


def rows_in_batch(batch: dict[str, Any]) -> int:
    """The number of rows of a batch that `collate` made."""
    return len(batch[COUNTS])


def weigh(
    batches: Sequence[dict[str, Any]],
    *,
    num_new: int | None,
    processes: int,
    add_up: Callable[[Tensor], Tensor],
) -> None:
    """Add weights to this process's micro-batches of a step.

    The trainer divides each loss by the number of micro-batches and averages over processes; the
    weights undo both.

    Args:
        batches: the micro-batches.
        num_new: how many rows of the last one are new; the rest, which fills up an epoch with rows
            of its beginning, counts nothing. None if all are new.
        processes: the number of processes.
        add_up: adds a tensor `[T]` up over all processes.
    """
    counts_BT = [batch[COUNTS] for batch in batches]
    if num_new is not None:
        counts_BT[-1][num_new:] = 0
    totals_T = add_up(torch.cat(counts_BT).sum(0))
    weights_T = torch.tensor(term_weights([totals_T.tolist()])) * len(batches) * processes
    for batch, counts in zip(batches, counts_BT, strict=True):
        batch[WEIGHTS] = counts.any(1, keepdim=True) * weights_T.to(counts.device)


def losses_and_counts(
    kind: ModelKind, model: torch.nn.Module, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The terms of the loss of each row of a batch, and what they count: `[B, T]` each."""
    batch = {key: value for key, value in inputs.items() if key not in (COUNTS, WEIGHTS)}
    return kind.row_losses(model, batch), inputs[COUNTS]


def share_of_loss(kind: ModelKind, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The loss of a batch or, where it was weighed, its share of the loss of the step."""
    batch = {key: value for key, value in inputs.items() if key not in (COUNTS, WEIGHTS)}
    if WEIGHTS not in inputs:
        return kind.loss(model, batch)
    weighted: Tensor = kind.row_losses(model, batch) * inputs[WEIGHTS]
    return weighted.sum()
