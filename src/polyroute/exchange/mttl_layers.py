"""mttl's rules for names: which layers it adapts, and which of them share a router."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from polyroute.config import Granularity
from polyroute.errors import InputError
from polyroute.host.patterns import matches
from polyroute.layer.granularity import routers_of

__all__ = ["chosen_layers", "our_granularity", "patterns_of", "router_prefix"]

PREFIXES = {
    "layerwise": r".*?layer\.\d+",
    "blockwise": r".*?block\.\d+",
    "coderwise": r".*?coder",
}


def chosen_layers(linear: Iterable[str], modules: str, layers: str) -> set[str]:
    """The linear layers that mttl would adapt.

    Args:
        linear: the names of all linear layers of the base model.
        modules: `modify_modules`, a regular expression for the full name of a layer's parent.
        layers: `modify_layers`, a regular expression for a layer's name in its parent.

    Raises:
        InputError: one of them is not a regular expression.
    """
    try:
        parted = [(name, *name.rpartition(".")[::2]) for name in linear]
        return {
            name
            for name, parent, own in parted
            if matches(modules, parent) and matches(layers, own)
        }
    except InputError as error:
        raise InputError(f"modify_modules or modify_layers cannot be used: {error}") from error


def patterns_of(chosen: Iterable[str], linear: Sequence[str]) -> tuple[str, str]:
    """The inverse of `chosen_layers`: patterns of parents and layers that choose exactly these.

    Raises:
        InputError: there are none, because a layer is adapted in one module and not in another.
    """
    names = set(chosen)
    parents = {name.rpartition(".")[0] for name in names}
    layers = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in names}))
    short = "|".join(sorted({f".*{re.escape(p.rpartition('.')[2])}" for p in parents}))
    for modules in (short, "|".join(sorted(map(re.escape, parents)))):
        if chosen_layers(linear, modules, layers) == names:
            return modules, layers
    raise InputError(
        "mttl adapts layers of the same names in every module that it adapts, but this inventory "
        "does not; it cannot be written for mttl"
    )


def router_prefix(layer: str, granularity: str) -> str:
    """The router of a layer in mttl: its name up to a mark, or `model` if it has no mark."""
    if granularity == "finegrained":
        return layer
    mark = re.match(PREFIXES.get(granularity, r"(?!)"), layer)
    return mark[0] if mark else "model"


def our_granularity(
    layers: Sequence[str], granularity: Granularity
) -> Granularity | Callable[[str], str]:
    """The granularity that groups these layers as mttl does: a name if one fits, or a function.

    Raises:
        InputError: mttl has no such granularity.
    """
    if granularity not in ("finegrained", "coarsegrained", *PREFIXES):
        raise InputError(f"mttl has no granularity {granularity!r}")
    rule = partial(router_prefix, granularity=granularity)
    theirs = routers_of(layers, rule)[1]
    for name in (granularity, "coarsegrained"):
        try:
            if routers_of(layers, name)[1] == theirs:
                return name
        except InputError:  # unlike mttl's rule, ours refuses names without a mark
            continue
    return rule
