"""Attaching a library to its base model, so that each LoRA is a task."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError, did_you_mean
from polyroute.exchange.peft_folder import names_now
from polyroute.layer.sites import Site, find_endings, named_sites
from polyroute.model import RoutedModel
from polyroute.routes.ragged import RaggedInventory

if TYPE_CHECKING:
    from polyroute.library.library import Library

__all__ = ["attach_library"]


def attach_library(base_model: nn.Module, library: "Library", names: Sequence[str]) -> RoutedModel:
    """Attach LoRAs to a base model that carries nothing yet.

    Args:
        base_model: the model that the LoRAs were trained on.
        library: has the LoRAs.
        names: those to attach, in the order of their tasks.

    Raises:
        InputError: there is no such LoRA, or the library belongs to another base model.
    """
    if not names:
        raise InputError("name at least one LoRA of the library to attach")
    for name in names:
        library.check_name(name)
    ranks = [library.ranks[name] for name in names]
    now = names_now(base_model, {layer for own in ranks for layer in own})
    order = [name for name, _ in base_model.named_modules(remove_duplicate=False)]
    if unknown := sorted(set(now.values()) - set(order)):
        raise InputError(
            f"the library belongs to another base model: {type(base_model).__name__} has no layer "
            f"{unknown[0]!r}; {did_you_mean(unknown[0], order)}"
        )
    stored = {name: layer for layer, name in now.items()}
    config = MHRConfig(method="private", rank=max(r for own in ranks for r in own.values()))
    sites = named_sites(base_model, [name for name in order if name in stored], config)
    for site in sites:
        _check_fits(site, library.widths[stored[site.name]])
    config = replace(config, target_modules=tuple(find_endings(base_model, sites)))
    by_site = [[own.get(stored[site.name], 0) for own in ranks] for site in sites]
    model = RoutedModel(base_model, config, sites, tuple(names), ranks=by_site)
    try:
        _fill(model, library, [stored[site.name] for site in sites])
    except BaseException:
        model.unload()
        raise
    return model


@torch.no_grad()
def _fill(model: RoutedModel, library: "Library", layers: Sequence[str]) -> None:
    inventory = model.inventory
    assert isinstance(inventory, RaggedInventory)
    for skill, name in enumerate(model.tasks):
        given = library[name].layers
        for place, layer in enumerate(layers):
            if layer in given:
                own, from_file = inventory.skill(place, skill), given[layer]
                own.a.copy_(from_file.a)
                own.b.copy_(from_file.b)


def _check_fits(site: Site, widths: tuple[int, int]) -> None:
    if (site.d_in, site.d_out) != widths:
        raise InputError(
            f"the library belongs to another base model: layer {site.name!r} is {site.d_in} to "
            f"{site.d_out} here, {widths[0]} to {widths[1]} there"
        )
