"""Saving an inventory with its rule and routing table, and filling a model with a saved one."""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.host.dtypes import are_finite_fractions
from polyroute.layer.fingerprint import changed_since, norm, sample, sample_all
from polyroute.layer.sites import Site
from polyroute.layer.wrapping import Wrapping, tensors_of
from polyroute.routes.inventory import Inventory
from polyroute.routes.mixer import Mixer
from polyroute.routes.ragged import RaggedInventory, make_inventory
from polyroute.routes.table_rules import rule_of
from polyroute.saved.checkpoint import (
    Checkpoint,
    Content,
    read_checkpoint,
    saved_config,
    write_checkpoint,
)
from polyroute.settings import marked

__all__ = ["check_same_function", "check_skills", "fill", "load_checkpoint", "save_inventory"]


def save_inventory(
    folder: str | os.PathLike[str],
    mixer: Mixer,
    wrapping: Wrapping,
    outside: Sequence[Mapping[str, Any]],
    *,
    is_main_process: bool,
) -> None:
    """Write an inventory; see `RoutedModel.save_pretrained`.

    Args:
        folder: the folder to write to; made if missing.
        mixer: has the skills, the table and the rule.
        wrapping: has the base model and its whole modules that train.
        outside: samples of the rest of the base model, taken when the inventory was attached.
        is_main_process: whether this process writes.

    Raises:
        InputError: there is nothing to save, or the folder cannot be written.
    """
    mixer.inventory.check_memory()
    if mixer.inventory.num_skills == 0:
        raise InputError("no private adapter is left to save: add a task first")
    unsaved = changed_since(wrapping.base_model, outside, list(wrapping.trained.values()))
    if unsaved:
        warnings.warn(
            f"{len(unsaved)} parameters of the base model trained or changed and are not saved "
            f"with the inventory: {_listed(unsaved)}; name their modules in "
            "MHRConfig(modules_to_save=[...]) to train and save them",
            stacklevel=3,
        )
    replaced = wrapping.replaced()
    if replaced:
        warnings.warn(
            f"the base model has other modules now in place of {_listed(replaced)}, so what is "
            "saved for these has no effect on it; put the modules back, or attach anew",
            stacklevel=3,
        )
    content = Content(
        description=_description(mixer, wrapping),
        skills=_skills(mixer.inventory),
        modules=_modules(mixer, wrapping),
        tasks=mixer.table.names,
        rows=mixer.table.logits,
        shape=mixer.table.shape,
    )
    if is_main_process:
        write_checkpoint(folder, content)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _description(mixer: Mixer, wrapping: Wrapping) -> dict[str, Any]:
    base, rule = wrapping.base_model, mixer.rule
    modules = wrapping.trained.values()
    trained = {id(p) for module in modules for p in module.parameters()}
    ranks = mixer.inventory.ranks if isinstance(mixer.inventory, RaggedInventory) else ()
    described: dict[str, Any] = {
        "config": mixer.config.to_dict(),
        "num_skills": mixer.inventory.num_skills,
        "anneal_progress": mixer.anneal_progress,
        "base": {
            "name": getattr(getattr(base, "config", None), "_name_or_path", None),
            "class": type(base).__name__,
            "sample": sample_all(base, list(modules), mixer.sites),
        },
        "routers": list(mixer.routers),
        "sites": [
            {
                "name": site.name,
                "d_in": site.d_in,
                "d_out": site.d_out,
                "router": mixer.router_of_site[i],
                **_fingerprint(site, trained),
                **({} if site.out_features == site.d_out else {"out_features": site.out_features}),
                **({"ranks": list(ranks[i])} if ranks else {}),
            }
            for i, site in enumerate(mixer.sites)
        ],
    }
    if rule.name != rule_of(mixer.config).name:
        described["rule"] = {"name": rule.name, "settings": rule.settings()}
    if _modules(mixer, wrapping):
        described["modules"] = True  # a reader expects the file of modules
    return described


def _fingerprint(site: Site, trained: Collection[int]) -> dict[str, Any]:
    """What identifies the weight of a layer, unless it trains with a module that it is tied to."""
    weight = None if id(getattr(site.layer, "weight", None)) in trained else site.weight
    return {
        "base_sample": sample(weight),
        "base_norm": norm(weight),
        "base_dtype": str(site.dtype),
    }


def _skills(inventory: Inventory) -> dict[str, Tensor]:
    return {
        f"{site.name}.{factor}": tensor
        for i, site in enumerate(inventory.sites)
        for factor, tensor in inventory.site_tensors(i).items()
    }


def check_skills(
    sites: Sequence[Site],
    config: MHRConfig,
    ranks: Sequence[Sequence[int]] | None,
    checkpoint: Checkpoint,
    source: str,
) -> None:
    """Make sure, before memory is taken, that a checkpoint has the skills that its settings say.

    Args:
        sites: the layers.
        config: the settings.
        ranks: for each layer the rank of each LoRA of a library, None for other inventories.
        checkpoint: the saved inventory.
        source: its place, for messages.

    Raises:
        InputError: a tensor of skills is missing, or has another shape.
    """
    skills = checkpoint.description["num_skills"]
    try:
        expected = make_inventory(sites, config, skills, ranks, torch.device("meta"))
    except RuntimeError as error:  # more numbers than can be counted
        raise InputError(f"{source} is damaged: its settings ask for too many skills") from error
    _check_shapes(_skills(expected), checkpoint.skills, source)


def _modules(mixer: Mixer, wrapping: Wrapping) -> dict[str, Tensor]:
    """The tensors that train besides skills and rows: `rule.*` and `module.*`."""
    return {
        **{f"rule.{name}": tensor for name, tensor in mixer.rule.state_dict().items()},
        **{f"module.{name}": tensor for name, tensor in tensors_of(wrapping.trained).items()},
    }


def check_same_function(
    checkpoint: Checkpoint, mixer: Mixer, source: str | os.PathLike[str]
) -> None:
    """Make sure that a checkpoint and a model compute the same if their numbers are equal.

    Args:
        checkpoint: the saved inventory.
        mixer: has the settings, the tasks, the rule and the routers of the model.
        source: the place of the checkpoint, for messages.

    Raises:
        InputError: tasks, settings, rules or routers differ.
    """
    source = os.fspath(source)
    if checkpoint.tasks != mixer.table.names:
        raise InputError(
            f"{source} holds other tasks than this model; use polyroute.from_pretrained to load "
            "another inventory"
        )
    here, there = mixer.config, saved_config(checkpoint.description)
    for name in marked(MHRConfig, "computes"):
        if getattr(here, name) != getattr(there, name):
            raise InputError(
                f"{source} has {name}={getattr(there, name)!r} and this model "
                f"{name}={getattr(here, name)!r}; "
                "use polyroute.from_pretrained to load another inventory"
            )
    saved = checkpoint.description.get("rule", {"name": rule_of(there).name, "settings": {}})
    own = {"name": mixer.rule.name, "settings": mixer.rule.settings()}
    if saved != own:
        raise InputError(
            f"{source} has the rule {saved['name']!r} {saved['settings']} and this model "
            f"{own['name']!r} {own['settings']}; use polyroute.from_pretrained to load another "
            "inventory"
        )
    routers = [
        checkpoint.description["routers"][s["router"]] for s in checkpoint.description["sites"]
    ]
    if routers != [mixer.routers[i] for i in mixer.router_of_site]:
        raise InputError(
            f"{source} assigns layers to other routers than this model; use "
            "polyroute.from_pretrained to load another inventory"
        )


def load_checkpoint(folder: str | os.PathLike[str], mixer: Mixer, wrapping: Wrapping) -> None:
    """Overwrite skills, rule and rows, in place, with those of a checkpoint.

    See `RoutedModel.load_adapter`.

    Raises:
        InputError: the checkpoint has other tasks, layers, settings or sizes.
    """
    checkpoint = read_checkpoint(folder)
    check_same_function(checkpoint, mixer, folder)
    fill(mixer, wrapping, checkpoint, os.fspath(folder))


@torch.no_grad()
def fill(mixer: Mixer, wrapping: Wrapping, checkpoint: Checkpoint, source: str) -> None:
    """Overwrite skills, rule, rows and whole modules, in place, with those of a checkpoint.

    Args:
        mixer: has the skills, the table and the rule.
        wrapping: has the whole modules that train.
        checkpoint: the saved inventory, with tensors of the same shapes.
        source: the place of the checkpoint, for messages.

    Raises:
        InputError: the shapes differ, or the skills have no memory. Nothing has changed then.
    """
    if mixer.device.type == "meta":
        raise InputError(
            f"{source} cannot be loaded onto the meta device: load the base model's weights "
            "first, or give the routed model memory with to_empty(device=...)"
        )
    pairs = [
        (_skills(mixer.inventory), checkpoint.skills),
        (_modules(mixer, wrapping), checkpoint.modules),
    ]
    for expected, saved in pairs:
        _check_tensors(expected, saved, source)
    saved_table, logits = checkpoint.saved_routes, mixer.table.logits
    if saved_table is not None:
        if logits is None or saved_table.shape != mixer.table.shape:
            raise InputError(
                f"{source} does not fit: its routing rows have shape {list(saved_table.shape)}, "
                f"those of this model {list(mixer.table.shape or ())}"
            )
        saved_table.check(mixer.table.names)
        saved_table.copy_into(logits, mixer.table.names)
    else:
        mixer.table.drop_logits()
    for expected, saved in pairs:
        for name, tensor in expected.items():
            tensor.copy_(saved[name])
    mixer.anneal_progress = float(checkpoint.description.get("anneal_progress", 0.0))


def _check_shapes(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    if saved.keys() != expected.keys():
        name = sorted(saved.keys() ^ expected.keys())[0]
        raise InputError(
            f"{source} does not fit: tensor {name!r} is on one side only, in the files or in this "
            "model"
        )
    for name, tensor in expected.items():
        if saved[name].shape != tensor.shape:
            raise InputError(
                f"{source} does not fit: tensor {name!r} has shape {list(saved[name].shape)} there "
                f"and {list(tensor.shape)} in this model"
            )


def _check_tensors(
    expected: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str
) -> None:
    _check_shapes(expected, saved, source)
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            continue  # a whole module may have counters, as batch norm has
        if not are_finite_fractions(saved[name]):
            raise InputError(
                f"{source} is damaged: tensor {name!r} holds values that are not finite "
                "fractional numbers; take an earlier checkpoint"
            )
