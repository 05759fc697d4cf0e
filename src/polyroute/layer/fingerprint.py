"""Fingerprints: a sample of the values of every weight, which identifies a base model."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.sites import COMPUTE_DTYPES, Site, is_plain

__all__ = ["SAMPLED", "changed_since", "check_base", "fits_sample", "sample", "sample_others"]

SAMPLED = 8
"""The number of values in the sample of a weight."""


def sample(weight: Tensor | None) -> list[float] | None:
    """A few values of a weight; None if it is missing, empty, packed or on the meta device."""
    if weight is None or not is_plain(weight) or weight.is_meta or not weight.numel():
        return None
    if hasattr(weight, "full_tensor"):  # sharded: every process has to call this
        weight = weight.full_tensor()
    flat = weight.detach().flatten()
    # Places are computed on the CPU, since devices round differently, and clamped, since fp32
    # rounds up the last place of a large matrix.
    places = torch.linspace(0, len(flat) - 1, SAMPLED, device="cpu", dtype=torch.float32)
    index = places.long().clamp_(max=len(flat) - 1).to(flat.device)
    return [round(v, 6) for v in flat[index].float().tolist()]


def sample_others(
    model: nn.Module, sites: Sequence[Site], but: Collection[nn.Module] = ()
) -> list[dict[str, Any]]:
    """Samples of every parameter outside the sites: embeddings, norms, heads.

    They tell whether the rest of the base model is still the same.

    Args:
        model: the base model.
        sites: the adapted layers, which have samples of their own.
        but: modules to leave out, because they train and are saved whole.

    Returns:
        For each parameter its `name`, its `dtype` and, as `values`, its sample.
    """
    left_out = {id(p) for module in (*(s.layer for s in sites), *but) for p in module.parameters()}
    return [
        {"name": name, "dtype": str(parameter.dtype), "values": sample(parameter)}
        for name, parameter in model.named_parameters()
        if id(parameter) not in left_out
    ]


def changed_since(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the parameters that differ from their samples, or that require gradients."""
    here = dict(model.named_parameters())
    return [
        one["name"]
        for one in samples
        if (parameter := here.get(one["name"])) is not None
        and (parameter.requires_grad or not fits_sample(parameter, one["values"], one["dtype"]))
    ]


def fits_sample(weight: Tensor | None, values: Sequence[float] | None, dtype: str | None) -> bool:
    """Whether a sample was taken from a weight with these values.

    Args:
        weight: the weight, `[d_out, d_in]` for a layer's. A weight that is missing, quantised or
            offloaded cannot be compared and fits every sample.
        values: the sample; None fits every weight.
        dtype: the type of the weight that was sampled; None if it is not known. If it differs from
            the type of `weight`, the coarser of the two may have rounded each value.
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
        description: the description of the saved inventory.
        source: the place of the inventory, for the message.

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
        if weight is not None:  # a parameter that the model lacks cannot differ
            compared.append(
                (f"parameter {other['name']!r}", weight, other["values"], other["dtype"])
            )
    for what, tensor, values, dtype in compared:
        if not fits_sample(tensor, values, dtype):
            raise InputError(
                f"{source} belongs to another base model: the weights of {what} differ from those "
                "that it was trained on (check_base=False loads it nevertheless)"
            )
