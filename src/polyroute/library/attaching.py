"""Attaching a library to its base model, so that each LoRA is a task."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError, did_you_mean
from polyroute.exchange.peft_folder import names_now
from polyroute.layer.sites import Site, find_endings, named_sites
from polyroute.model import RoutedModel
from polyroute.routes.mixer import Mixer
from polyroute.routes.ragged import RaggedInventory

if TYPE_CHECKING:
    from polyroute.library.library import Library

__all__ = ["attach_library", "library_of", "owners_of", "places_of"]


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
    # Names of layers may be those of older versions of transformers, in some of the LoRAs.
    stored = [_by_name_now(base_model, library.ranks[name]) for name in names]
    there = {now for own in stored for now in own}
    order = [name for name, _ in base_model.named_modules(remove_duplicate=False)]
    if unknown := sorted(there - set(order)):
        raise InputError(
            f"the library belongs to another base model: {type(base_model).__name__} has no layer "
            f"{unknown[0]!r}; {did_you_mean(unknown[0], order)}"
        )
    rank = max(rank for name in names for rank in library.ranks[name].values())
    config = MHRConfig(method="private", rank=rank)
    sites = named_sites(base_model, [name for name in order if name in there], config)
    for own in stored:
        for site in sites:
            if site.name in own:
                _check_fits(site, library.widths[own[site.name]])
    config = replace(config, target_modules=tuple(find_endings(base_model, sites)))
    by_site = [
        [library.ranks[name].get(own.get(site.name, ""), 0)
         for name, own in zip(names, stored, strict=True)]
        for site in sites
    ]  # fmt: skip
    model = RoutedModel(base_model, config, sites, tuple(names), ranks=by_site)
    try:
        _fill(model, library, stored)
    except BaseException:
        model.unload()
        raise
    return model


def library_of(model: RoutedModel) -> RaggedInventory:
    """The LoRAs of a library that a model has, each the skill of one task.

    Raises:
        InputError: it has none.
    """
    if not isinstance(model.inventory, RaggedInventory) or not model.rule.owns_skills:
        raise InputError("this needs the LoRAs of a library: attach a polyroute.Library")
    return model.inventory


def owners_of(mixer: Mixer) -> tuple[str | int, ...]:
    """Whose each skill is: a task's, which may move in the table, or else its number."""
    names = mixer.table.names
    return names if mixer.rule.owns_skills else tuple(range(mixer.inventory.num_skills))


def places_of(owners: Sequence[str | int], mixer: Mixer) -> tuple[int, ...]:
    """Where a rule that was made for some owners finds those of the present skills.

    Raises:
        InputError: a skill came after the rule was made, or the rule belongs to another model.
    """
    place = {owner: i for i, owner in enumerate(owners)}
    now = owners_of(mixer)
    if lacking := [owner for owner in now if owner not in place]:
        raise InputError(
            f"this rule knows nothing of {lacking[0]!r}: it was made for another model, or before "
            "that was added; make a new rule"
        )
    return tuple(place[owner] for owner in now)


def _by_name_now(base_model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """What a LoRA calls each layer, by the name that the base model has for it."""
    return {now: name for name, now in names_now(base_model, layers).items()}


@torch.no_grad()
def _fill(model: RoutedModel, library: "Library", stored: Sequence[Mapping[str, str]]) -> None:
    inventory = library_of(model)
    for skill, (name, own) in enumerate(zip(model.tasks, stored, strict=True)):
        given = library[name].layers
        for place, site in enumerate(model.sites):
            if site.name in own:
                to, from_file = inventory.skill(place, skill), given.get(own[site.name])
                if from_file is None or to.a.shape != from_file.a.shape:
                    raise InputError(f"the LoRA {name!r} has changed since its library was made")
                to.a.copy_(from_file.a)
                to.b.copy_(from_file.b)


def _check_fits(site: Site, widths: tuple[int, int]) -> None:
    if (site.d_in, site.d_out) != widths:
        raise InputError(
            f"the library belongs to another base model: layer {site.name!r} is {site.d_in} to "
            f"{site.d_out} here, {widths[0]} to {widths[1]} there"
        )
