"""Fingerprints: a sample of the values of every weight, which identifies a base model."""

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from polyroute.errors import InputError
from polyroute.layer.sites import COMPUTE_DTYPES, Site, is_plain

__all__ = [
    "SAMPLED",
    "changed_since",
    "check_base",
    "fits_sample",
    "norm",
    "sample",
    "sample_all",
]

PIECE = 1 << 18
"""The number of values that are squared at once, so that their copy in fp64 stays in the cache."""
SAMPLED = 8
"""The number of values in the sample of a weight."""
SAME_NORM = 1e-7
"""The relative difference of norms that rounding explains where all values are the same."""


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


def norm(weight: Tensor | None) -> float | None:
    """The 2-norm of a weight, which changes wherever it does; None where `sample` is.

    It is computed anew only after the weight has changed in place.
    """
    if weight is None or not is_plain(weight) or weight.is_meta or not weight.numel():
        return None
    stamp = (weight._version, weight.data_ptr())
    known = _norms.get(weight)
    if known is None or known[0] != stamp:
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        if whole.device.type == "mps":  # it has no float64
            whole = whole.cpu()
        pieces = (piece.double() for piece in whole.detach().flatten().split(PIECE))
        squares = torch.stack([torch.dot(piece, piece) for piece in pieces])
        _norms[weight] = known = (stamp, float(squares.sum().sqrt()))
    return known[1]


_norms: MutableMapping[Tensor, tuple[tuple[int, int], float]] = WeakTensorKeyDictionary()


def _named(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, and the buffers that a state dict has, by the names in the bare model."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(name, recurse=False):
            if key.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                found[key] = buffer
    return {name.replace(".base_layer.", "."): tensor for name, tensor in found.items()}


def _ids_in(modules: Collection[nn.Module]) -> set[int]:
    return {id(t) for module in modules for t in (*module.parameters(), *module.buffers())}


def sample_all(
    model: nn.Module, but: Collection[nn.Module] = (), sites: Sequence[Site] = ()
) -> list[dict[str, Any]]:
    """Samples of every parameter and buffer of a model.

    Args:
        model: the base model.
        but: modules to leave out, because they train and are saved whole.
        sites: layers whose weights are left out, because they have samples of their own.

    Returns:
        For each tensor its `name`, its `dtype`, as `values` its sample, and its `norm`.
    """
    left_out, weights = _ids_in(but), {f"{site.name}.weight" for site in sites}
    return [
        {
            "name": name,
            "dtype": str(tensor.dtype),
            "values": sample(tensor),
            "norm": norm(tensor),
        }
        for name, tensor in _named(model).items()
        if id(tensor) not in left_out and name not in weights
    ]


def changed_since(
    model: nn.Module, samples: Sequence[Mapping[str, Any]], but: Collection[nn.Module] = ()
) -> list[str]:
    """The names of the tensors that differ from samples, require gradients, came or went.

    Args:
        model: the base model.
        samples: of `sample_all`.
        but: modules to leave out, because they train and are saved whole.
    """
    before, here = {one["name"]: one for one in samples}, _named(model)
    left_out = _ids_in(but)
    changed = [
        name
        for name, tensor in here.items()
        if id(tensor) not in left_out
        and (name not in before or tensor.requires_grad or not _fits(tensor, before[name]))
    ]
    return changed + [name for name in before if name not in here]


def _fits(tensor: Tensor, one: Mapping[str, Any]) -> bool:
    """Whether a tensor has the sampled values of a fingerprint, and its norm if it holds one."""
    if not fits_sample(tensor, one["values"], one["dtype"]):
        return False
    here, there = norm(tensor), one.get("norm")
    if here is None or there is None or one["dtype"] != str(tensor.dtype):
        return True
    return bool(abs(here - there) <= SAME_NORM * abs(there))


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
        (f"layer {site.name!r}", site.weight, {
            "values": saved["base_sample"],
            "dtype": saved.get("base_dtype"),
            "norm": saved.get("base_norm"),
        })
        for site, saved in zip(sites, description["sites"], strict=True)
    ]  # fmt: skip
    here = _named(model)
    for other in description["base"].get("sample", []):
        if other["name"] in here:  # what the model lacks cannot differ
            compared.append((f"parameter {other['name']!r}", here[other["name"]], other))
    for what, tensor, one in compared:
        if tensor is not None and not _fits(tensor, one):
            raise InputError(
                f"{source} belongs to another base model: the weights of {what} differ from those "
                "that it was trained on (check_base=False loads it nevertheless)"
            )
