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
    def runs(self) -> list[tuple[slice, slice, int]]:
        """Examples of one length in a row: their tokens, which examples they are, the length."""
        found, token, example = [], 0, 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            tokens = slice(token, token + count * length)
            found.append((tokens, slice(example, example + count), length))
            token, example = tokens.stop, example + count
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
