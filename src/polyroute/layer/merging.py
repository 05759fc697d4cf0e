"""Folding one task's factors into the base weights, and restoring the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.factors import PlainFactors
from polyroute.layer.sites import Site, weight_matrix

__all__ = ["check_mergeable", "fold", "restore"]


def check_mergeable(base_model: nn.Module, sites: Sequence[Site]) -> None:
    """Make sure that the weight of every site may be changed.

    Raises:
        InputError: a weight is quantised, offloaded or sharded, or it is tied to another layer,
            which would change too.
    """
    owners: dict[int, int] = {}
    for module in base_model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for site in sites:
        weight = site.weight
        if weight is None:
            held = getattr(site.layer, "weight", site.layer)
            reason = f"is quantised ({type(held).__name__})"
        elif weight.is_meta:
            reason = "is not in memory (offloaded, or on the meta device)"
        elif hasattr(weight, "full_tensor"):
            reason = "is sharded over processes"
        elif id(site.layer.weight) not in owners:
            reason = "is computed from other parameters"
        elif owners[id(site.layer.weight)] > 1:
            reason = "is tied to another layer"
        else:
            continue
        raise InputError(
            f"the weight of layer {site.name!r} {reason} and cannot be merged; "
            "export the task as a LoRA (export_peft) instead"
        )


@torch.no_grad()
def fold(sites: Sequence[Site], factors: Sequence[PlainFactors]) -> dict[str, Tensor]:
    """Change the base weights, in place, so that they compute one task.

        W <- W + alpha/r (A B)^T   (LoRA),      W <- W * l, c <- c * l   ((IA)^3)

    Args:
        sites: the layers.
        factors: the factors of the task, by site.

    Returns:
        The original tensors by full name, for `restore`: subtracting the update would not restore
        them bit for bit.
    """
    originals: dict[str, Tensor] = {}
    for site, factor in zip(sites, factors, strict=True):
        weight, bias = site.layer.weight, site.layer.bias
        assert isinstance(weight, nn.Parameter)
        originals[site.name + ".weight"] = weight.data
        exact = torch.promote_types(weight.dtype, torch.float32)
        old_bias = bias.data.to(exact) if isinstance(bias, nn.Parameter) else None
        new, new_bias = factor.fold(weight_matrix(site.layer).to(exact), old_bias)
        weight.data = (new.t() if site.is_conv1d else new).to(weight.dtype).contiguous()
        if isinstance(bias, nn.Parameter) and new_bias is not old_bias:
            assert new_bias is not None
            originals[site.name + ".bias"] = bias.data
            bias.data = new_bias.to(bias.dtype)
    return originals


def restore(sites: Sequence[Site], originals: dict[str, Tensor]) -> None:
    """Undo `fold`, in place: bit for bit, or rounded to the type that a layer was cast to since."""
    for site in sites:
        for name in ("weight", "bias"):
            original = originals.get(f"{site.name}.{name}")
            if original is not None:
                parameter = getattr(site.layer, name)
                parameter.data = original.to(device=parameter.device, dtype=parameter.dtype)
