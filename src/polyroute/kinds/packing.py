"""Packed rows: several examples of a batch one after another, so that little of it is padding.

Positions begin again at 0 with each example. transformers then lets each example see itself alone,
and a routed model gives each its own task (see `polyroute.RoutedModel.route`, `segments`). Examples
of a task that begin with the same tokens, such as its instruction, may share them: they are then
one tree (see `polyroute.kinds.trees`), and the tokens that they share are computed once.

Shape letters: B examples, R rows, L tokens of a row, T tokens of a target, n labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.kinds.batches import FAILURES, IGNORED, Ids, logits_of, padded
from polyroute.kinds.trees import Tree, laid_out

__all__ = ["Packing", "can_pack", "packed_rows"]

MULTIPLES = (1, 2, 3, 4)
"""The lengths of rows that are tried, in lengths of the longest tree."""
ATTENTION = 1000
"""The length of a row at which attention costs a token as much as everything else."""
OVERHEAD = 1.2
"""The cost of a token of a packed row of several tasks, whose update is computed in another layout,
in tokens of a padded one. Measured with SmolLM2 in bfloat16 on a CPU, as is `ATTENTION`."""

ROUNDING, ROUNDINGS = 0.05, 32
"""What rounding may change, as a share of the largest logit, and in roundings of one number; the
larger one counts. With SmolLM2 in bfloat16 it is up to a tenth, which is 12 roundings, and depends
on numbers as small as a start drawn at random."""


@dataclass(frozen=True)
class Packing:
    """What a model computes in packed rows as it does in rows of one example."""

    shared: int = 0
    """The most tokens of a row whose examples share their beginnings; 0 for none."""


@dataclass(frozen=True)
class _Group:
    """Examples, by number, whose prompts begin with the same tokens."""

    members: Sequence[int]
    depth: int
    """How many tokens they share."""
    length: int
    """The tokens of their tree."""

    def tree(self, whole: Sequence[Ids]) -> Tree:
        """Their tree, of the tokens of all examples."""
        prefix = whole[self.members[0]][: self.depth]
        return Tree(prefix, [whole[one][self.depth :] for one in self.members])


def packed_rows(
    prompts: Sequence[Ids],
    targets: Sequence[Ids],
    tasks: Sequence[str],
    packing: Packing,
    *,
    pad: int,
    limit: int,
) -> dict[str, Any] | None:
    """Pack examples into rows, in the cheapest way.

    The last token of a target predicts nothing and is left out.

    Args:
        prompts: the token ids of B prompts.
        targets: those of their targets.
        tasks: their tasks.
        packing: what the model can do.
        pad: the id that fills rows up.
        limit: the number of positions that the model has.

    Returns:
        None if packing does not pay. Otherwise `labels` `[B, T]`, the targets in the given order;
        `places` `[n]`, the place among the R L tokens that predicts each of them; `input_ids`,
        `position_ids` and, if examples share a beginning, `attention_mask`, as
        `polyroute.kinds.trees.laid_out` makes them; and `tasks`, the task of each tree in the order
        of the rows.
    """
    whole = [[*prompt, *target[:-1]] for prompt, target in zip(prompts, targets, strict=True)]
    rows, cost = min(_ways(prompts, whole, tasks, packing), key=lambda way: way[1])
    overhead = OVERHEAD if len(set(tasks)) > 1 else 1
    if overhead * cost >= _cost([max(map(len, whole))] * len(whole)):
        return None
    trees = [[group.tree(whole) for group in row] for row in rows]
    inputs, places = laid_out(trees, pad=pad, limit=limit)
    groups = [group for row in rows for group in row]
    order = [one for group in groups for one in group.members]
    of_example = dict(zip(order, places, strict=True))
    predicting = [of_example[one][len(prompts[one]) - 1 :] for one in range(len(whole))]
    return {
        "labels": padded(targets, IGNORED),
        "places": torch.tensor([place for own in predicting for place in own]),
        **inputs,
        "tasks": [tasks[group.members[0]] for group in groups],
    }


def _ways(
    prompts: Sequence[Ids], whole: Sequence[Ids], tasks: Sequence[str], packing: Packing
) -> Iterator[tuple[list[list[_Group]], float]]:
    """Ways to fill rows, and their costs: with 1, 2, 4, 8 ... examples in a tree."""
    of_task: dict[str, list[int]] = {}
    for one in sorted(range(len(whole)), key=lambda one: whole[one]):
        of_task.setdefault(tasks[one], []).append(one)
    most = 1
    while True:
        groups = [
            group
            for members in of_task.values()
            for group in _groups(prompts, whole, members, most)
        ]
        lengths = [group.length for group in groups]
        for multiple in MULTIPLES:
            filled = _filled(lengths, multiple * max(lengths))
            sizes = [sum(lengths[number] for number in row) for row in filled]
            if most == 1 or max(sizes) <= packing.shared:
                yield [[groups[number] for number in row] for row in filled], _cost(sizes)
        if not packing.shared or most >= max(map(len, of_task.values())):
            return
        most *= 2


def _groups(
    prompts: Sequence[Ids], whole: Sequence[Ids], members: Sequence[int], most: int
) -> Iterator[_Group]:
    """Examples of a task, in the order of their tokens, in groups of at most `most`.

    What all of a group begin with is then what the first and the last begin with. At least
    one token of each prompt stays its own, so that no place predicts the labels of two examples.
    """
    parts = -(-len(members) // most)
    for part in range(parts):
        own = members[part * len(members) // parts : (part + 1) * len(members) // parts]
        pairs = zip(whole[own[0]], whole[own[-1]], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        depth = min(common, *(len(prompts[one]) - 1 for one in own))
        if len(own) == 1 or depth < 1:
            yield from (_Group([one], 0, len(whole[one])) for one in own)
        else:
            yield _Group(own, depth, depth + sum(len(whole[one]) - depth for one in own))


def _cost(sizes: Sequence[int]) -> float:
    """What rows cost, in tokens: attention costs a token more the longer its row is."""
    return len(sizes) * max(sizes) * (1 + max(sizes) / ATTENTION)


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
    types = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    coarsest = max(torch.finfo(dtype).eps for dtype in types if dtype.itemsize > 1)
    share = max(ROUNDING, ROUNDINGS * coarsest)
    gap = (found - alone).abs().max()
    return torch.equal(found, other) and bool(gap <= share * alone.abs().max())
