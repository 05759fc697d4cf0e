"""Granularity: which layers share a router."""

from collections.abc import Callable, Sequence
from typing import get_args

from polyroute.config import Granularity
from polyroute.errors import InputError
from polyroute.settings import named

__all__ = ["router_of", "routers_of"]


def routers_of(
    names: Sequence[str], granularity: Granularity | Callable[[str], str]
) -> tuple[list[str], list[int]]:
    """Group layers by router.

    Args:
        names: full layer names.
        granularity: a named granularity (see `router_of`), or a function from the name of a layer
            to the name of its router.

    Returns:
        The router names in order of first use, and for every layer the index of its router.

    Raises:
        InputError: the granularity does not apply to a layer name.
    """
    keys = [
        granularity(name) if callable(granularity) else router_of(name, granularity)
        for name in names
    ]
    routers = list(dict.fromkeys(keys))
    index = {key: i for i, key in enumerate(routers)}
    return routers, [index[key] for key in keys]


def router_of(name: str, granularity: Granularity) -> str:
    """The name of a layer's router under one of the named granularities.

    - `finegrained`: each layer has its own router.
    - `blockwise`: the layers of a transformer block share a router. The block is the name up to
      its first number (`encoder.block.0`, `model.layers.12`, `transformer.h.3`).
    - `layerwise`: the layers of one part of a block share a router. The part is the block and the
      next component of the name, with its number if one follows (`encoder.block.0.layer.1`,
      `model.layers.12.self_attn`).
    - `coderwise`: the encoder has one router and the decoder has another.
    - `coarsegrained`: the whole model has one router.

    Raises:
        InputError: the name contains no numbered block, or neither an encoder nor a decoder.
    """
    named(get_args(Granularity))("granularity", granularity)
    if granularity == "finegrained":
        return name
    if granularity == "coarsegrained":
        return "model"
    parts = name.split(".")
    if granularity == "coderwise":
        for part in parts:
            if part in ("encoder", "decoder"):
                return part
        raise InputError(
            f"granularity='coderwise' needs an encoder or decoder in the name of layer {name!r}; "
            "use 'coarsegrained', or give a function"
        )
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        raise InputError(
            f"granularity={granularity!r} needs a numbered block in the name of layer {name!r}; "
            "leave the layer out with exclude_modules, or give a function"
        )
    end = number + 1
    if granularity == "layerwise":
        end += 1
        if end < len(parts) and parts[end].isdigit():
            end += 1
    return ".".join(parts[:end])
