"""Stacks: adapted layers of one shape, whose skills lie in one tensor and are mixed at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyroute.layer.sites import Site

__all__ = ["Stack", "skills_like", "stacks_of"]


@dataclass(frozen=True)
class Stack:
    """The layers of one shape."""

    key: str
    sites: tuple[int, ...]
    """The positions of its layers in the list of sites."""
    d_in: int
    d_out: int


def skills_like(sites: Sequence[Site]) -> Tensor:
    """An empty tensor of the type and on the device that skills of these sites have.

    The type is fp32 at least: what trains must not be rounded to the type of a bf16 base model.
    """
    dtype = torch.promote_types(sites[0].dtype, torch.float32)
    return torch.empty(0, dtype=dtype, device=sites[0].device)


def stacks_of(sites: Sequence[Site]) -> tuple[Stack, ...]:
    """Put the layers of one shape together, in the order in which shapes first occur."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for place, site in enumerate(sites):
        by_shape.setdefault((site.d_in, site.d_out), []).append(place)
    return tuple(
        Stack(f"{d_in}x{d_out}", tuple(members), d_in, d_out)
        for (d_in, d_out), members in by_shape.items()
    )
