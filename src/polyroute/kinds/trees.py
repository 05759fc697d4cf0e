"""Trees: sequences that begin alike, in a row that holds their common beginning once.

A row holds one tree after another. Each token sees itself and the tokens before it in its own
sequence, and its position counts these alone, so it gets the logits that it would get in a row of
its own.

Shape letters: R rows, L tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyroute.kinds.batches import Ids, padded, rounded

__all__ = ["Tree", "laid_out"]


@dataclass(frozen=True)
class Tree:
    """Some sequences, in tokens."""

    prefix: Ids
    """The beginning that they have in common; empty only if there is one sequence."""
    branches: Sequence[Ids]
    """What follows in each of them, which may be nothing."""

    @property
    def length(self) -> int:
        """The number of tokens in a row."""
        return len(self.prefix) + sum(map(len, self.branches))


def laid_out(
    rows: Sequence[Sequence[Tree]], *, pad: int, limit: int
) -> tuple[dict[str, Tensor], list[Ids]]:
    """Lay trees out in rows.

    Args:
        rows: the trees of each row.
        pad: the id that fills rows up.
        limit: the number of positions that the model has.

    Returns:
        `input_ids` and `position_ids` `[R, L]`, L being `rounded`, and, if a tree has several
        branches, `attention_mask` `[R, 1, L, L]`: whether a token (third axis) sees another one
        (fourth axis). Without branches, transformers finds it in the positions. And for each
        sequence, in order, the place of each of its tokens among all R L.
    """
    longest = rounded(max(sum(tree.length for tree in row) for row in rows), len(rows))
    ids, positions, places = [], [], []
    for number, row in enumerate(rows):
        own: Ids = []
        counted: list[int] = []
        for tree in row:
            root, depth = len(own), len(tree.prefix)
            own += tree.prefix
            counted += range(depth)
            for branch in tree.branches:
                start, end = len(own), len(own) + len(branch)
                own += branch
                counted += range(depth, depth + len(branch))
                both = (*range(root, root + depth), *range(start, end))
                places.append([number * longest + place for place in both])
        # What fills the row up goes on counting, so that it begins no tree.
        rest = range(counted[-1] + 1, counted[-1] + 1 + longest - len(own))
        ids.append(own)
        positions.append([*counted, *(min(place, limit - 1) for place in rest)])
    found = {"input_ids": padded(ids, pad, length=longest), "position_ids": padded(positions, 0)}
    if any(len(tree.branches) > 1 for row in rows for tree in row):
        found["attention_mask"] = torch.stack([_sees(row, longest) for row in rows])[:, None]
    return found, places


def _sees(row: Sequence[Tree], longest: int) -> Tensor:
    """Whether a token of a row (first axis) sees another one (second axis)."""
    before = torch.ones(longest, longest, dtype=torch.bool).tril()
    sees = torch.eye(longest, dtype=torch.bool)  # what fills the row up sees itself
    start = 0
    for tree in row:
        root, start = start, start + len(tree.prefix)
        sees[root:start, root:start] = before[root:start, root:start]
        own = slice(root, start)
        for branch in tree.branches:
            end = start + len(branch)
            sees[start:end, own] = True
            sees[start:end, start:end] = before[start:end, start:end]
            start = end
    return sees
