"""The update of few vectors of each example, in 16 bits on CPUs: what decoding needs.

A matrix product of 16 bits that has few vectors takes longer to start than to compute, and casting
its factors to fp32 writes twice as much memory as it reads. Looking up rows of a table is what
`embedding_bag` is made for: (x a^T) b is a sum of the rows of b with the weights z = x a^T, and the
gradient of such a sum to its weights is a product with rows, as z is. Both read factors as they
are, once for each vector, and sum in fp32; z itself is rounded to 16 bits, as in other products.
The rows may be anywhere, so examples need not lie side by side. For the measurement see
docs/design.md, "Executors".

Shape letters: B examples, M vectors of each, N vectors of all, S kept examples, r rank.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from polyroute.layer.segments import Segments

__all__ = ["Places", "add_to_few", "are_few", "can_look_up", "is_few"]

MOST = 4
"""Vectors of each example of a batch; with more, batched products are faster."""
MOST_PACKED = 64
"""Vectors of the mean example of packed rows; with more, a product for each example is faster."""
MOST_JOINED = 8
"""Examples of packed rows that one joined product computes as fast."""
_SUM = 0
"""The number of the mode in which `embedding_bag` sums."""
_products = torch.ops.aten._embedding_bag_per_sample_weights_backward.default


def can_look_up(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether looking factors up is fast."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def is_few(x: Tensor) -> bool:
    """Whether `add_to_few` is the fastest way to update vectors `[..., M, d_in]`."""
    return x.shape[-2] <= MOST and can_look_up(x.device, x.dtype)


def are_few(segments: Segments) -> bool:
    """Whether `add_to_few` is the fastest way to update packed rows."""
    count, total = len(segments.lengths), sum(segments.lengths)
    return segments.length == 1 or (count > MOST_JOINED and total <= MOST_PACKED * count)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the factors of each vector lie among the rows of all factors."""

    rows: Tensor
    """The rows of the first vector, then those of the second, `[N r]`."""
    begins: Tensor
    """Where those of each vector begin, `[N]`."""
    vectors: Tensor
    """The vector to which each belongs, `[N r]`."""

    @classmethod
    def of(cls, owners: Tensor, rank: int) -> "Places":
        """The places of vectors by the example whose factors each has, `[N]`."""
        with torch.inference_mode(False):
            numbers = torch.arange(len(owners), device=owners.device)
            rows = owners[:, None] * rank + torch.arange(rank, device=owners.device)
            return cls(rows.flatten(), numbers * rank, numbers.repeat_interleave(rank))


def add_to_few(y: Tensor, x: Tensor, a: Tensor, b: Tensor, places: Places | None = None) -> Tensor:
    """Add (x a^T) b to y in place, without gradients, and return y.

    Args:
        y: `[M, d_out]` or `[B, M, d_out]`.
        x: `[M, d_in]` or `[B, M, d_in]`.
        a: `[r, d_in]` for all vectors, or `[B, r, d_in]`; with places, `[S, r, d_in]`.
        b: `[r, d_out]`, `[B, r, d_out]` or `[S, r, d_out]`, scale included.
        places: which factors each vector has, if they are not those of its example.
    """
    if places is None:
        places = _in_order(1 if a.dim() == 2 else len(a), x.shape[-2], a.shape[-2])
    flat_x, flat_a, flat_b = (t.reshape(-1, t.shape[-1]) for t in (x, a, b))
    z = _products(flat_x, flat_a, places.rows, places.begins, places.vectors, _SUM)
    found = torch.embedding_bag(flat_b, places.rows, places.begins, False, _SUM, False, z, False)
    return y.add_(found[0].view(y.shape))


@lru_cache(maxsize=256)
def _in_order(count: int, length: int, rank: int) -> Places:
    """The places where each example has as many vectors, and factors of its own or the only ones.

    Args:
        count: the number of factors.
        length: the number M of vectors of each example.
        rank: the rank r.
    """
    return Places.of(torch.arange(count, device="cpu").repeat_interleave(length), rank)
