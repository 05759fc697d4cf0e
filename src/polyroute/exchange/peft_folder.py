"""Reading the folders that PEFT's `save_pretrained` writes, for any method."""

import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.exchange.foreign import ForeignInventory, read_pickle
from polyroute.host.files import read_json, read_tensors
from polyroute.layer.sites import find_sites
from polyroute.saved.peft_export import CONFIG, ROOT, TENSORS

__all__ = [
    "PICKLE",
    "adapters_inside",
    "check_whole",
    "folders_inside",
    "names_now",
    "peft_type_of",
    "read_peft_folder",
]

PICKLE = "adapter_model.bin"
COPY = r"(\.base_layer)?\.weight$"
"""Ends the key of a copy of an adapted layer's weight."""
MOST_NAMES = 8
"""As many sub-folders are named in an error message."""


def peft_type_of(folder: str | os.PathLike[str]) -> str | None:
    """The method of the adapter in a folder, as PEFT spells it; None if there is no adapter.

    Raises:
        InputError: the settings of the adapter are damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise InputError(f"{path} is damaged: it holds no settings of an adapter")
    return str(fields.get("peft_type"))


def folders_inside(folder: str | os.PathLike[str]) -> list[Path]:
    """The sub-folders, at most two below, that hold adapters, sorted.

    What lies inside an adapter, such as checkpoints of its training, is not among them.
    """
    place = Path(folder)
    found = {p.parent for form in ("*/", "*/*/") for p in place.glob(form + CONFIG)}
    return sorted(path for path in found if path.parent not in found)


def adapters_inside(folder: str | os.PathLike[str]) -> str:
    """What to do with a folder whose sub-folders hold adapters; empty if none does."""
    found = folders_inside(folder)
    if not found:
        return ""
    names = [str(path.relative_to(folder)) for path in found]
    some = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    return (
        f"adapters are in its sub-folders, so name one of them ({some}), or take all as a library "
        "(polyroute.Library, `polyroute import --format library`)"
    )


def read_peft_folder(
    base_model: nn.Module | None,
    folder: str | os.PathLike[str],
    peft_type: str,
    *,
    allow_pickle: bool,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Read the settings and the tensors of an adapter.

    PEFT saves a copy of the embeddings or of the output layer beside an adapter of them. The
    tensors are without such copies.

    Args:
        base_model: the model that the adapter was trained on; without it a weight beside its own
            LoRA is taken for a copy, with a warning.
        folder: a folder that PEFT wrote.
        peft_type: the method that the adapter must have.
        allow_pickle: read `adapter_model.bin` if there are no safetensors; see `read_pickle`.

    Raises:
        InputError: the folder holds no adapter of this method, its files are damaged, or a copy
            is not what the base model has.
    """
    path, source = Path(folder), os.fspath(folder)
    found = peft_type_of(path)
    if found is None:
        inside = adapters_inside(path) or f"there is no {CONFIG} in it"
        raise InputError(f"{source} is no PEFT checkpoint: {inside}")
    if found != peft_type:
        raise InputError(
            f"{source} holds an adapter of PEFT type {found!r}, but {peft_type!r} is needed"
        )
    if (path / TENSORS).is_file() or not (path / PICKLE).is_file():
        tensors: Mapping[str, Any] = read_tensors(path / TENSORS)
    else:
        tensors = read_pickle(path / PICKLE, allowed=allow_pickle)
    copies = _copies(base_model, tensors, source)
    return read_json(path / CONFIG), {k: v for k, v in tensors.items() if k not in copies}


def _copies(
    base_model: nn.Module | None, tensors: Mapping[str, Any], source: str
) -> Collection[str]:
    """The keys of weights of the base model, such as that of an adapted output layer."""
    if base_model is None:
        adapted = {key.split(".lora_A.")[0] for key in tensors if ".lora_A." in key}
        found = [key for key in tensors if re.sub(COPY, "", key) in adapted]
        if found:
            warnings.warn(
                f"{source} also holds {found[0]!r}, which is taken for a copy of the base model's "
                "weight and left out",
                stacklevel=4,
            )
        return found
    own = base_model.state_dict()
    copies = {
        key: weight
        for key in tensors
        if (weight := own.get(key.removeprefix(ROOT).replace(".base_layer.", "."))) is not None
    }
    for key, weight in copies.items():
        if not _is_copy(tensors[key], weight):
            raise InputError(
                f"{source} holds {key!r} with other values than the base model has: load the base "
                "model that it was trained on; modules_to_save and other trained weights of the "
                "base model cannot be imported"
            )
    return copies.keys()


def _is_copy(tensor: Any, weight: Tensor) -> bool:
    """Whether a tensor has the values of a weight of the base model, in the precision of either."""
    if weight.is_meta:  # it has no values yet
        return True
    if not isinstance(tensor, Tensor) or tensor.shape != weight.shape:
        return False
    weight = weight.to(tensor.device)
    return torch.equal(weight.to(tensor.dtype), tensor) or torch.equal(
        weight, tensor.to(weight.dtype)
    )


def check_whole(base_model: nn.Module, found: ForeignInventory, fields: Mapping[str, Any]) -> None:
    """Make sure that every layer that the settings of an adapter choose has tensors.

    Raises:
        InputError: one has none, or the settings do not fit the base model.
    """
    target = fields.get("target_modules")
    if not target or fields.get("exclude_modules") or fields.get("layers_to_transform") is not None:
        return
    try:
        sites = find_sites(base_model, replace(found.config, target_modules=target))
    except InputError as error:
        raise InputError(f"{found.source} belongs to another base model: {error}") from error
    missing = sorted({site.name for site in sites} - found.layers)
    if missing:
        raise InputError(
            f"{found.source} has no adapter for layer {missing[0]!r}, which its settings choose: "
            "it is not whole, or belongs to another base model"
        )


def names_now(base_model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """What the base model calls layers whose names may be those of older versions of transformers.

    transformers renamed parts of some models, such as the language model of LLaVA, and knows how.
    """
    there = {name for name, _ in base_model.named_modules()}
    names = {layer: layer for layer in layers}
    older = [layer for layer in names if layer not in there]
    renamings = _renamings(base_model) if older else []
    for layer in older:
        key = f"{layer}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        if key.removesuffix(".weight") in there:
            names[layer] = key.removesuffix(".weight")
    return names


def _renamings(base_model: nn.Module) -> list[Any]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(base_model, PreTrainedModel):
        return []
    return [r for r in get_model_conversion_mapping(base_model) if isinstance(r, WeightRenaming)]
