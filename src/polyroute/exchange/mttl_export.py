"""Writing an inventory as a checkpoint of mttl; see `polyroute.exchange.mttl` for the layout."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.exchange.foreign import NAMES, check_exportable
from polyroute.exchange.mttl import HYPER_PARAMETERS, STATE
from polyroute.exchange.mttl_layers import our_granularity, patterns_of
from polyroute.host.files import check_place, make_folder, whole_file, write_json, write_tensors
from polyroute.host.paths import path_of
from polyroute.model import RoutedModel

__all__ = ["write_mttl"]


def write_mttl(model: RoutedModel, path: str | os.PathLike[str]) -> None:
    """Write all skills and routes as a checkpoint of mttl, in the layout of the paper's code.

    Routing rows are sorted by the names of their tasks, as mttl numbers them; the names are written
    to `tasks.json` beside them.

    Args:
        model: a model with method `mhr`, `poly` or `shared`.
        path: a folder for `state_dict.safetensors` and `hyper_parameters.json`; or a file name that
            ends in `.ckpt`, for the pickle that mttl itself reads.

    Raises:
        InputError: mttl has no such method or grouping of layers, or the path cannot be written.
    """
    check_exportable(model, "mttl")
    place = path_of(path)
    hyper, state, names = _hyper_parameters(model), _state(model), sorted(model.tasks)
    if place.suffix != ".ckpt":
        folder = make_folder(place)
        write_tensors(folder / STATE, state)
        write_json(folder / HYPER_PARAMETERS, hyper)
        write_json(folder / NAMES, names)
        return
    if place.is_dir():
        raise InputError(f"{place} is a folder; name a file that ends in .ckpt, or another folder")
    check_place(place.parent)
    make_folder(place.parent)
    with whole_file(place) as unfinished:
        torch.save({"hyper_parameters": hyper, "state_dict": state}, unfinished)
    write_json(place.with_suffix(f".{NAMES}"), names)


def _hyper_parameters(model: RoutedModel) -> dict[str, Any]:
    config, base = model.adapter_config, model.base_model
    wrapped = {id(site.layer) for site in model.sites}
    layers = [site.name for site in model.sites]
    others = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in wrapped
    ]
    modules, own = patterns_of(layers, [*layers, *others])
    if config.has_router:
        settings = {"model_modifier": "poly", **_router(config, model, layers)}
    else:
        settings = {"model_modifier": config.adapter}
    if config.adapter == "lora":
        settings |= {"lora_rank": config.rank, "lora_alpha": config.alpha}
    return {
        "model": getattr(getattr(base, "config", None), "_name_or_path", None),
        "modify_modules": modules,
        "modify_layers": own,
        "n_tasks": len(model.tasks),
        **settings,
    }


def _router(config: MHRConfig, model: RoutedModel, layers: list[str]) -> dict[str, Any]:
    granularity = config.granularity
    if config.adapter == "ia3":
        raise InputError(
            "mttl routes only LoRAs, and this is an inventory of (IA)^3; write each task with "
            "--format peft"
        )
    if callable(granularity) or our_granularity(layers, granularity) != granularity:
        raise InputError(
            "mttl cannot let the same layers share a router as this inventory does; write each "
            "task with --format peft"
        )
    return {
        "n_skills": model.inventory.num_skills,
        "n_splits": config.heads,
        "router_selector": "poly",
        "router_granularity": granularity,
        "module_logits_l2_norm": config.normalization == "l2",
        "module_logits_relaxed_bernoulli": config.gate == "relaxed_bernoulli",
        "module_logits_straight_through": config.gate == "straight_through",
        "module_logits_dropout": config.logit_dropout,
        "poly_average_correction": config.normalization == "average_correction",
        "poly_use_shared_skill": config.shared_skill,
    }


def _state(model: RoutedModel) -> dict[str, Tensor]:
    """The tensors by key; the logits of a router are stored at its first layer."""
    rows = sorted(range(len(model.tasks)), key=model.tasks.__getitem__)
    logits = model.routes.logits
    shape = (len(rows), len(model.routers), -1)
    table = None if logits is None else logits.detach()[rows].reshape(shape)
    state: dict[str, Tensor] = {}
    written: set[int] = set()
    for i, site in enumerate(model.sites):
        for factor, skills in model.inventory.site_tensors(i).items():
            part = "multi_lora_b" if factor == "ia3" else factor
            whole = skills if model.adapter_config.has_router else skills[0, 0]
            flat = whole[0] if factor == "ia3" else whole
            state[f"model.{site.name}.{part}"] = flat.detach().cpu().contiguous().clone()
        router = model.mixer.router_of_site[i]
        if table is not None and router not in written:
            written.add(router)
            state[f"model.{site.name}.selector.module_logits"] = table[:, router].cpu().clone()
    return state
