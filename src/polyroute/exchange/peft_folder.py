"""Reading the folders that PEFT's `save_pretrained` writes, for any method."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from polyroute.errors import InputError
from polyroute.exchange.foreign import ForeignInventory, read_pickle
from polyroute.host.files import read_json, read_tensors
from polyroute.layer.sites import find_sites
from polyroute.saved.peft_export import CONFIG, TENSORS

__all__ = ["check_whole", "peft_type_of", "read_peft_folder"]

PICKLE = "adapter_model.bin"


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


def read_peft_folder(
    folder: str | os.PathLike[str], peft_type: str, *, allow_pickle: bool
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Read the settings and the tensors of an adapter.

    Args:
        folder: a folder that PEFT wrote.
        peft_type: the method that the adapter must have.
        allow_pickle: read `adapter_model.bin` if there are no safetensors; see `read_pickle`.

    Raises:
        InputError: the folder holds no adapter of this method, or its files are damaged.
    """
    path, source = Path(folder), os.fspath(folder)
    found = peft_type_of(path)
    if found is None:
        raise InputError(f"{source} is no PEFT checkpoint: there is no {CONFIG} in it")
    if found != peft_type:
        raise InputError(
            f"{source} holds an adapter of PEFT type {found!r}, but {peft_type!r} is needed"
        )
    if (path / TENSORS).is_file() or not (path / PICKLE).is_file():
        tensors: Mapping[str, Any] = read_tensors(path / TENSORS)
    else:
        tensors = read_pickle(path / PICKLE, allowed=allow_pickle)
    return read_json(path / CONFIG), tensors


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
