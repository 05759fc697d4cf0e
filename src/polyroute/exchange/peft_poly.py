"""Reading and writing checkpoints of PEFT's Poly tuner.

A checkpoint is a folder with `adapter_config.json` and a safetensors file:

    base_model.model.<layer>.poly_lora_A                    [H, K, d_in/H, r]
    base_model.model.<layer>.poly_lora_B                    [H, K, r, d_out/H]
    base_model.model.<layer>.poly_router.module_logits      [T, H * K]

The update is always scaled by 1/r, which means an alpha of 1, and every layer has its own router.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.exchange.foreign import (
    NAMES,
    ForeignInventory,
    check_exportable,
    read_names,
    routed_model,
)
from polyroute.exchange.peft_folder import check_whole, read_peft_folder
from polyroute.host.files import write_json
from polyroute.model import RoutedModel
from polyroute.saved.peft_export import ROOT, write_peft_folder

__all__ = ["from_peft_poly", "write_peft_poly"]

COUNTS = ("r", "n_tasks", "n_skills", "n_splits")
ROUTER = "poly_router.module_logits"
KEY = re.compile(
    rf"{re.escape(ROOT)}(?P<layer>.+)\.(?P<part>poly_lora_A|poly_lora_B|{re.escape(ROUTER)})"
)


def from_peft_poly(
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    allow_pickle: bool = False,
) -> RoutedModel:
    """Attach the inventory of a PEFT Poly checkpoint to its base model.

    PEFT draws its gates in training (`gate="relaxed_bernoulli"`); in evaluation they are sigmoids.

    Args:
        base_model: the model that the checkpoint was trained on.
        folder: a folder that PEFT's `save_pretrained` wrote.
        tasks: the names of the tasks, in the order of `task_ids`; None for the names that
            `write_peft_poly` wrote, or numbers if there are none.
        allow_pickle: read `adapter_model.bin` if there are no safetensors. Only tensors are read
            from it, and no code in it is run.

    Raises:
        InputError: the folder holds no Poly checkpoint, it is not whole, or it does not fit the
            base model.
    """
    source, path = os.fspath(folder), Path(folder)
    fields, tensors = read_peft_folder(base_model, path, "POLY", allow_pickle=allow_pickle)
    config = _config(fields, source)
    if tasks is None and (path / NAMES).is_file():
        tasks = read_names(path / NAMES)
    found = _inventory(tensors, config, source)
    check_whole(base_model, found, fields)
    if any(len(table) != fields["n_tasks"] for table in found.logits.values()):
        raise InputError(
            f"{source} has n_tasks={fields['n_tasks']} but another number of routing rows; "
            "it is damaged"
        )
    return routed_model(base_model, found, tasks)


def _config(fields: Mapping[str, Any], source: str) -> MHRConfig:
    if fields.get("poly_type", "poly") != "poly":
        raise InputError(f"{source} has poly_type={fields['poly_type']!r}, but 'poly' is needed")
    for name in COUNTS:
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{source}: {name} must be a positive whole number, not {value!r}")
    return MHRConfig(
        method="mhr" if fields["n_splits"] > 1 else "poly",
        num_heads=fields["n_splits"],
        num_skills=fields["n_skills"],
        rank=fields["r"],
        alpha=1.0,
        init="peft",
        gate="relaxed_bernoulli",
    )


def _inventory(tensors: Mapping[str, Any], config: MHRConfig, source: str) -> ForeignInventory:
    skills: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or not isinstance(tensor, Tensor):
            raise InputError(
                f"{source} holds {key!r}, which is no part of Poly; modules_to_save and other "
                "trained weights of the base model cannot be imported"
            )
        if match["part"] == ROUTER:
            logits[match["layer"]] = tensor
        else:
            factor = match["part"].removeprefix("poly_").lower()
            skills[f"{match['layer']}.{factor}"] = tensor
    if not skills or not logits:
        raise InputError(f"{source} lacks the skills or the routing of Poly; it is not whole")
    return ForeignInventory(source, config, skills, logits)


def write_peft_poly(model: RoutedModel, folder: str | os.PathLike[str]) -> None:
    """Write all skills and routes as a checkpoint that PEFT loads as `PolyConfig`.

    The rows are in the order of `model.tasks`, whose names are also written to `tasks.json`. The
    scale is folded into B. Without logits every task gets a uniform route.

    Args:
        model: a model with method `mhr` or `poly` and one router for each layer.
        folder: the folder to write to; created if missing.

    Raises:
        InputError: PEFT's Poly has no such method or gate, or the folder cannot be written.
    """
    check_exportable(model, "PEFT's Poly")
    config, num_routers = model.adapter_config, len(model.routers)
    _check_plain(config, model)
    names = list(model.tasks)
    width = config.heads * model.inventory.num_skills
    logits = model.routes.logits
    table = torch.zeros(len(names), num_routers * width) if logits is None else logits.detach()
    table = table.view(len(names), num_routers, width)
    assert config.alpha is not None
    tensors: dict[str, Tensor] = {}
    for i, site in enumerate(model.sites):
        prefix, skills = f"{site.name}.", model.inventory.site_tensors(i)
        tensors[prefix + "poly_lora_A"] = skills["lora_a"]
        tensors[prefix + "poly_lora_B"] = skills["lora_b"] * config.alpha
        tensors[prefix + ROUTER] = table[:, model.mixer.router_of_site[i]]
    fields = {
        "peft_type": "POLY",
        "poly_type": "poly",
        "r": config.rank,
        "n_tasks": len(names),
        "n_skills": model.inventory.num_skills,
        "n_splits": config.heads,
    }
    write_peft_folder(folder, model.base_model, model.sites, fields, tensors)
    write_json(Path(folder) / NAMES, names)


def _check_plain(config: MHRConfig, model: RoutedModel) -> None:
    """Make sure that PEFT's Poly computes the same as the model.

    Raises:
        InputError: it does not; the message names the setting.
    """
    finegrained = len(model.routers) == len(model.sites)
    for holds, what in (
        (config.has_router, f"no method {config.method!r}"),
        (config.adapter == "lora", "no (IA)^3"),
        (config.gate != "straight_through", f"no gate {config.gate!r}"),
        (config.normalization == "sum", f"no normalization {config.normalization!r}"),
        (not config.shared_skill, "no shared skill"),
        (not config.logit_dropout, "no dropout of gates"),
        (finegrained, "a router for each layer, but layers of this inventory share routers"),
        (bool(model.tasks), "no inventory without tasks"),
    ):
        if not holds:
            raise InputError(f"PEFT's Poly has {what}; write each task with --format peft")
