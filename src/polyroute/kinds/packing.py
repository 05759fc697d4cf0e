"""Packed rows: several examples of a batch one after another, so that little of it is padding.

Positions begin again at 0 with each example. transformers then lets each example see itself alone,
and a routed model gives each its own task (see `polyroute.RoutedModel.route`, `segments`).

Shape letters: B examples, R rows, L tokens of a row, T tokens of a target, n labels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.kinds.batches import FAILURES, IGNORED, Ids, logits_of, padded

__all__ = ["can_pack", "packed_rows"]

MULTIPLES = (1, 2, 3, 4)
"""The lengths of rows that are tried, in lengths of the longest example."""
ATTENTION = 1000
"""The length of a row at which attention costs a token as much as everything else."""
OVERHEAD = 1.2
"""The cost of a token of a packed row, whose update is computed in another layout, in tokens of a
padded one. Measured with SmolLM2 in bfloat16 on a CPU, as is `ATTENTION`."""


def packed_rows(
    prompts: Sequence[Ids], targets: Sequence[Ids], tasks: Sequence[str], *, pad: int, limit: int
) -> dict[str, Any] | None:
    """Pack examples into rows.

    Args:
        prompts: the token ids of B prompts.
        targets: those of their targets.
        tasks: their tasks.
        pad: the id that fills rows up.
        limit: the number of positions that the model has.

    Returns:
        None if packing does not pay. Otherwise `labels` `[B, T]`, the targets in the given order;
        `places` `[n]`, the place among the R L tokens that predicts each of them; `input_ids` and
        `position_ids` `[R, L]`; and `tasks`, the task of each example in the order of the rows.
    """
    lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    rooms = [multiple * max(lengths) for multiple in MULTIPLES]
    rows = min((_filled(lengths, room) for room in rooms), key=lambda rows: _cost(lengths, rows))
    if OVERHEAD * _cost(lengths, rows) > _cost(lengths, [[one] for one in range(len(lengths))]):
        return None
    longest = max(sum(lengths[one] for one in row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    positions = torch.zeros_like(ids)
    places: dict[int, range] = {}
    for number, members in enumerate(rows):
        end = 0
        for one in members:
            start, end = end, end + lengths[one]
            ids[number, start:end] = torch.tensor([*prompts[one], *targets[one]])
            positions[number, start:end] = torch.arange(end - start)
            first = number * longest + start + len(prompts[one]) - 1
            places[one] = range(first, first + len(targets[one]))
        # What fills the row up goes on counting, so that it begins no example.
        rest = torch.arange(longest - end) + lengths[members[-1]]
        positions[number, end:] = rest.clamp_max(limit - 1)
    return {
        "labels": padded(targets, IGNORED),
        "places": torch.tensor([place for one in range(len(prompts)) for place in places[one]]),
        "input_ids": ids,
        "position_ids": positions,
        "tasks": [tasks[one] for members in rows for one in members],
    }


def _cost(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> float:
    """What rows cost, in tokens: attention costs a token more the longer its row is."""
    longest = max(sum(lengths[one] for one in row) for row in rows)
    return len(rows) * longest * (1 + longest / ATTENTION)


def _filled(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Examples, by number, in as few rows as the longest-first rule finds."""
    rows: list[list[int]] = []
    left: list[int] = []
    for one in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        fitting = [row for row, free in enumerate(left) if free >= lengths[one]]
        if fitting:
            row = min(fitting, key=lambda row: left[row])
            rows[row].append(one)
            left[row] -= lengths[one]
        else:
            rows.append([one])
            left.append(room - lengths[one])
    return rows


def can_pack(model: nn.Module, task: str) -> bool:
    """Whether a routed model keeps packed examples apart; it is tried on two of three tokens.

    A changed example must leave the other one as it is bit for bit, and that must be what it is in
    a row of its own but for rounding.

    Args:
        model: the routed model.
        task: the task that it is tried with.
    """

    def logits(ids: Ids, *positions: int) -> Tensor:
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        return logits_of(model, inputs, [task] * positions.count(0))[-3:].float()

    try:
        found = logits([5, 6, 7, 8, 9, 10], 0, 1, 2, 0, 1, 2)
        other = logits([7, 5, 6, 8, 9, 10], 0, 1, 2, 0, 1, 2)
        alone = logits([8, 9, 10], 0, 1, 2)
    except FAILURES:  # it takes no such rows
        return False
    gap = (found - alone).abs().max()
    return torch.equal(found, other) and bool(gap <= 0.05 * alone.abs().max())
