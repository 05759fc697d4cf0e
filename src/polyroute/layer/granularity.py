"""Granularity: which layers share a router."""

from collections.abc import Callable, Sequence

from polyroute.config import Granularity
from polyroute.errors import InputError

__all__ = ["router_of", "routers_of"]


def routers_of(
    names: Sequence[str], granularity: Granularity | Callable[[str], str]
) -> tuple[list[str], list[int]]:
    """Group layers by router.

    Args:
        names: full layer names.
        granularity: a named rule (see `router_of`) or a function from layer name to router name.

    Returns:
        The router names in order of first use, and for every layer the index of its router.

    Raises:
        InputError: the rule does not apply to a layer name.
    """
    keys = [
        granularity(name) if callable(granularity) else router_of(name, granularity)
        for name in names
    ]
    routers = list(dict.fromkeys(keys))
    index = {key: i for i, key in enumerate(routers)}
    return routers, [index[key] for key in keys]


def router_of(name: str, granularity: Granularity) -> str:
    """The router of a layer under one of the named rules.

    - `finegrained`: each layer has its own.
    - `blockwise`: layers of one transformer block share one. The block is the name up to its first
      number (`encoder.block.0`, `model.layers.12`, `transformer.h.3`).
    - `layerwise`: layers of one part of a block share one: the block and the next name component,
      with its number where it has one (`encoder.block.0.layer.1`, `model.layers.12.self_attn`).
    - `coderwise`: the encoder has one and the decoder has one.
    - `coarsegrained`: one for the whole model.

    Raises:
        InputError: the name has no block or no coder in it.
    """
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
