"""Packed rows: where the examples of a batch lie whose sequences hold several each.

Shape letters: B examples, N tokens, r rank.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

__all__ = ["Segments"]


@dataclass(frozen=True)
class Segments:
    """Where the examples of packed rows begin and end, in the order of the flattened batch."""

    lengths: tuple[int, ...]
    """The number of tokens of each example; they sum to all tokens of the batch, with padding."""

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """The first token of each example, and the token after its last."""
        ends = list(accumulate(self.lengths))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @cached_property
    def length(self) -> int | None:
        """The length of every example; None if they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @cached_property
    def blocks(self) -> "list[tuple[slice, slice, Segments]]":
        """Neighbours that all have one token, or all have more.

        Returns:
            For each block its tokens, which examples they are, and where these lie in the block.
        """
        found, token, example = [], 0, 0
        for _, group in groupby(self.lengths, lambda length: length == 1):
            part = Segments(tuple(group))
            tokens = slice(token, token + sum(part.lengths))
            examples = slice(example, example + len(part.lengths))
            found.append((tokens, examples, part))
            token, example = tokens.stop, examples.stop
        return found

    def owners(self, like: Tensor, rank: int) -> Tensor:
        """Which columns belong to the example of each token, `[N, B r]`: 1 those, 0 the others.

        Args:
            like: a tensor of the device and type of the result.
            rank: the rank r, so many columns has each example.
        """
        key = (like.device, like.dtype, rank)
        if key not in self._owners:
            counts = torch.tensor(self.lengths, device=like.device)
            own = torch.eye(len(self.lengths), dtype=like.dtype, device=like.device)
            own = own.repeat_interleave(rank, 1)
            self._owners[key] = own.repeat_interleave(counts, 0, output_size=sum(self.lengths))
        return self._owners[key]

    @cached_property
    def _owners(self) -> dict[tuple[torch.device, torch.dtype, int], Tensor]:
        return {}

    def spread(self, of_examples: Tensor) -> Tensor:
        """Repeat the entry of each example for all of its tokens: `[B, ...]` to `[N, ...]`."""
        counts = torch.tensor(self.lengths, device=of_examples.device)
        return of_examples.repeat_interleave(counts, 0, output_size=sum(self.lengths))
