"""Rows of logits as a caller gives them, checked and flat."""

from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError

__all__ = ["flat_rows"]


def flat_rows(
    values: Any, shape: tuple[int, int, int], dtype: torch.dtype, count: int | None = None
) -> Tensor:
    """One row `[N * H * K]`; or, with a count, one row or as many as that, `[count, N * H * K]`.

    Args:
        values: `[N, H, K]` or flat, or as many of these as `count` says.
        shape: `(N, H, K)` of a row.
        dtype: the type of the table, in which they must be finite.
        count: how many rows there may be in place of one.

    Raises:
        InputError: it is no tensor of real numbers in memory, has another shape or is not finite.
    """
    if (
        not isinstance(values, Tensor)
        or values.layout != torch.strided
        or values.is_meta
        or values.is_complex()
    ):
        kind = type(values).__name__
        if isinstance(values, Tensor):
            kind = f"one on {values.device}, of type {values.dtype} and layout {values.layout}"
        raise InputError(
            f"a routing row must be a dense tensor of real numbers, not {kind}; make one with "
            "torch.as_tensor"
        )
    given, width = tuple(values.shape), shape[0] * shape[1] * shape[2]
    if given not in (shape, (width,)) and (
        count is None or given not in ((count, *shape), (count, width))
    ):
        raise InputError(
            f"a routing row has shape {list(shape)} (routers, heads, skills), not {list(given)}"
        )
    # Converted first: a finite double may be infinite in the precision of the table.
    rows = values.detach().to(dtype)
    if not rows.isfinite().all():
        raise InputError("a routing row must hold finite numbers; check the values")
    return rows.reshape(-1) if given in (shape, (width,)) else rows.reshape(-1, width)
