"""Fingerprints: a few values of every weight, by which a base model is recognised."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.sites import COMPUTE_DTYPES, Site, is_plain

__all__ = ["SAMPLED", "changed_since", "check_base", "fits_sample", "sample", "sample_others"]

SAMPLED = 8
"""How many values of a weight are kept."""


def sample(weight: Tensor | None) -> list[float] | None:
    """A few values of a weight; None where there is none, or it is packed or without memory."""
    if weight is None or not is_plain(weight) or weight.is_meta or not weight.numel():
        return None
    if hasattr(weight, "full_tensor"):  # sharded: all processes come by here
        weight = weight.full_tensor()
    flat = weight.detach().flatten()
    # Always on the CPU, since devices round differently; clamped, since linspace counts in fp32,
    # which rounds up the last place of a large matrix.
    places = torch.linspace(0, len(flat) - 1, SAMPLED, device="cpu", dtype=torch.float32)
    index = places.long().clamp_(max=len(flat) - 1).to(flat.device)
    return [round(v, 6) for v in flat[index].float().tolist()]


def sample_others(
    model: nn.Module, sites: Sequence[Site], but: Collection[nn.Module] = ()
) -> list[dict[str, Any]]:
    """A few values of every parameter that no site holds: embeddings, norms, heads.

    They tell whether the rest of the base model is the one it was.

    Args:
        model: the base model.
        sites: the adapted layers, which have samples of their own.
        but: modules to leave out, because they train and are saved whole.
    """
    left_out = {id(p) for module in (*(s.layer for s in sites), *but) for p in module.parameters()}
    return [
        {"name": name, "dtype": str(parameter.dtype), "values": sample(parameter)}
        for name, parameter in model.named_parameters()
        if id(parameter) not in left_out
    ]


def changed_since(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the parameters that differ from what was sampled, or that are to be trained."""
    here = dict(model.named_parameters())
    return [
        one["name"]
        for one in samples
        if (parameter := here.get(one["name"])) is not None
        and (parameter.requires_grad or not fits_sample(parameter, one["values"], one["dtype"]))
    ]


def fits_sample(weight: Tensor | None, values: Sequence[float] | None, dtype: str | None) -> bool:
    """Whether a weight of the base model is the one that a sample was taken from.

    Args:
        weight: as it is here, `[d_out, d_in]` where it is a layer's; None, and a quantised or
            offloaded one, fits everything, as nothing can be compared.
        values: what was saved; None, where nothing was, fits everything.
        dtype: the type that it had there; None where that is not known. Where it is another than
            here, the coarser of both may have rounded each value.
    """
    here = sample(weight)
    if weight is None or values is None or here is None:
        return True
    there = torch.tensor(values)
    eps = {str(known): torch.finfo(known).eps for known in COMPUTE_DTYPES}
    coarser = max(torch.finfo(weight.dtype).eps, eps.get(str(dtype), eps["torch.bfloat16"]))
    tolerance = 1e-4 if dtype == str(weight.dtype) else max(1e-4, 2 * coarser)
    gap = (there - torch.tensor(here)).abs().max()
    return bool(gap <= tolerance * there.abs().max() + 1e-6)


def check_base(
    model: nn.Module, sites: Sequence[Site], description: Mapping[str, Any], source: str
) -> None:
    """Make sure that the base model's weights are those that an inventory was trained on.

    Args:
        model: the base model.
        sites: the adapted layers, in the order of the description.
        description: of the saved inventory.
        source: where it is, for the message.

    Raises:
        InputError: a weight differs; the message names it.
    """
    compared = [
        (f"layer {site.name!r}", site.weight, saved["base_sample"], saved.get("base_dtype"))
        for site, saved in zip(sites, description["sites"], strict=True)
    ]
    parameters = dict(model.named_parameters())
    for other in description["base"].get("sample", []):
        weight = parameters.get(other["name"])
        if weight is not None:  # sites were all found; a part that is not there cannot differ
            compared.append(
                (f"parameter {other['name']!r}", weight, other["values"], other["dtype"])
            )
    for what, tensor, values, dtype in compared:
        if not fits_sample(tensor, values, dtype):
            raise InputError(
                f"{source} belongs to another base model: the weights of {what} "
                "differ from those it was trained on (check_base=False loads it all the same)"
            )
