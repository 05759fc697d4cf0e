"""Making routed models from a base model and settings, or from a saved inventory."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from polyroute.config import CUSTOM, MHRConfig
from polyroute.errors import InputError
from polyroute.layer.fingerprint import check_base as check_weights
from polyroute.layer.sites import Site, find_sites, named_sites
from polyroute.layer.wrapping import check_bare
from polyroute.model import RoutedModel
from polyroute.routes.rule import RouteRule, rule_named
from polyroute.routes.tasks import check_list
from polyroute.saved.checkpoint import Checkpoint, read_checkpoint, saved_config
from polyroute.saved.hub import DESCRIPTION, FILES, MODULES, SKILLS, locate
from polyroute.saved.inventory import check_skills, fill
from polyroute.task_names import check_names

__all__ = ["attach", "from_checkpoint", "from_pretrained", "loaded"]


class Attachable(Protocol):
    """What brings skills of its own, such as `polyroute.Library`."""

    def attach_to(self, base_model: nn.Module, tasks: Sequence[str] | None) -> RoutedModel:
        """Attach the skills of some tasks, by default all, to a base model without adapters."""


def attach(
    base_model: nn.Module,
    config: MHRConfig | Attachable,
    tasks: Iterable[str] | None = None,
    *,
    sites: Sequence[str] | None = None,
    rule: RouteRule | None = None,
) -> RoutedModel:
    """Attach an inventory of skills, and a row of logits for each task, to a base model.

    The base model's parameters are frozen, and its chosen layers are wrapped in place, with their
    weights unchanged. `RoutedModel.unload` undoes this.

    Args:
        base_model: any tree of torch modules that takes its batch on the first axis.
        config: the settings of the adapter; or a `polyroute.Library`, each LoRA of which becomes a
            task of its name. A batch of several tasks then uses several LoRAs, in generation and in
            training.
        tasks: unique names, in the order of their rows. Of a library they choose LoRAs, by default
            all.
        sites: exact names of layers to adapt, in place of `config.target_modules`.
        rule: chooses skills; by default the rule of `config.method`. See
            `polyroute.routes.rule.RouteRule`.

    Raises:
        InputError: no layer matches, the heads do not divide a width, task names clash, a library
            belongs to another base model, or the model carries an adapter already. The model is
            then as it was before.
    """
    if not isinstance(base_model, nn.Module):
        raise InputError(f"base_model must be a torch module, not a {type(base_model).__name__}")
    has_skills = not isinstance(config, MHRConfig) and hasattr(config, "attach_to")
    if not (has_skills or isinstance(config, MHRConfig)):
        raise InputError(
            f"config must be an MHRConfig, not a {type(config).__name__}: write MHRConfig(...)"
        )
    if not (has_skills and tasks is None):
        if not isinstance(tasks, Iterable) or isinstance(tasks, set | frozenset):
            raise InputError(
                f"tasks must be a list of names, not {tasks!r}: their order is that of the rows"
            )
        check_list(tasks)
        tasks = tuple(tasks)
        check_names(tasks)
    if isinstance(base_model, RoutedModel):
        raise InputError(
            "the base model carries an inventory already; call unload() on the routed model"
        )
    check_bare(base_model)
    if not isinstance(config, MHRConfig):
        if sites is not None or rule is not None:
            raise InputError("the LoRAs of a library have their layers: leave sites and rule out")
        return config.attach_to(base_model, tasks)
    assert tasks is not None
    if config.method == "private" and not tasks:
        raise InputError("method='private' has one skill per task: name at least one task")
    if rule is not None and not isinstance(rule, RouteRule):
        raise InputError(f"rule must be a RouteRule, not a {type(rule).__name__}")
    found = (
        find_sites(base_model, config) if sites is None else named_sites(base_model, sites, config)
    )
    return RoutedModel(base_model, config, found, tasks, rule)


def from_pretrained(  # noqa: PLR0913 (public: the hub's keywords, as elsewhere)
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    check_base: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> RoutedModel:
    """Attach a saved inventory to the base model that it was trained on.

    Args:
        base_model: as given to `attach` when the inventory was made.
        folder: the folder that `RoutedModel.save_pretrained` wrote or, if there is no such folder,
            an id on the hub, `user/inventory`.
        tasks: the tasks whose rows are loaded, `[]` for none; default all. Other rows are not
            read, and parts of the table without a row of these tasks are not downloaded.
        check_base: whether to refuse a base model whose weights differ from those of training.
        revision: a branch, a tag or a commit on the hub; default the main branch.
        token: a token for the hub; by default that of the login; False for none.
        cache_dir: a cache for files of the hub in place of the usual one.
        local_files_only: whether to use the hub's cache alone, without network.

    Raises:
        InputError: the files are damaged, belong to another base model, or cannot be fetched.
    """
    files = FILES if tasks is None else (DESCRIPTION, SKILLS, MODULES)
    place = locate(
        folder, files, revision=revision, token=token, cache_dir=cache_dir,
        local_files_only=local_files_only,
    )  # fmt: skip
    return from_checkpoint(
        base_model, read_checkpoint(place), os.fspath(folder), tasks, check_base=check_base
    )


def from_checkpoint(
    base_model: nn.Module,
    checkpoint: Checkpoint,
    source: str,
    tasks: Sequence[str] | None = None,
    *,
    check_base: bool = True,
) -> RoutedModel:
    """Build a routed model from a saved inventory.

    Args:
        base_model: as in `from_pretrained`.
        checkpoint: the saved inventory.
        source: the place of the inventory, for messages.
        tasks: as in `from_pretrained`.
        check_base: as in `from_pretrained`.

    Raises:
        InputError: the inventory is damaged or belongs to another base model.
    """
    description, saved_table = checkpoint.description, checkpoint.saved_routes
    check_list(tasks)
    sites = description["sites"]
    router_of = {site["name"]: description["routers"][site["router"]] for site in sites}
    settings = saved_config(description)
    # The layers keep their saved routers, whichever granularity assigned these.
    config = replace(settings, granularity=router_of.__getitem__)
    try:
        adapted = {site["name"]: site["d_out"] for site in sites if "out_features" in site}
        found = named_sites(base_model, list(router_of), config, adapted)
    except InputError as error:
        raise InputError(f"{source} belongs to another base model: {error}") from error
    for site, described in zip(found, sites, strict=True):
        _check_widths(site, described, source)
    if check_base:
        check_weights(base_model, found, description, source)
    # Without a table all tasks are loaded and then some are kept: private skills are in one file.
    loaded_tasks = checkpoint.tasks if tasks is None or saved_table is None else tuple(tasks)
    saved = description.get("rule")
    rule = None if saved is None else rule_named(saved["name"]).restored(saved["settings"])
    check_bare(base_model)
    ranks = [site["ranks"] for site in sites] if "ranks" in sites[0] else None
    check_skills(found, config, ranks, checkpoint, source)
    model = RoutedModel(base_model, config, found, loaded_tasks, rule, ranks=ranks)
    if description["config"]["granularity"] != CUSTOM:
        model.mixer.become(settings, model.rule)
    try:
        fill(model.mixer, model.wrapping, checkpoint, source)
        if tasks is not None and saved_table is None:
            model.keep_tasks(tasks)
    except BaseException:
        model.unload()
        raise
    return model


def _check_widths(site: Site, saved: Mapping[str, Any], source: str) -> None:
    here = (site.d_in, site.d_out, site.out_features)
    there = (saved["d_in"], saved["d_out"], saved.get("out_features", saved["d_out"]))
    if here != there:
        raise InputError(
            f"{source} belongs to another base model: layer {site.name!r} is "
            f"{here[0]} to {here[2]} here, {there[0]} to {there[2]} there"
        )


@contextmanager
def loaded(
    base_model: nn.Module,
    checkpoint: Checkpoint,
    source: str | os.PathLike[str],
    tasks: Sequence[str] | None = None,
) -> Iterator[RoutedModel]:
    """Attach a saved inventory to its base model inside a `with` block, and unload it afterwards.

    Args:
        base_model: the base model.
        checkpoint: the saved inventory.
        source: the place of the inventory, for messages.
        tasks: as in `from_pretrained`.

    Raises:
        InputError: as `from_checkpoint`.
    """
    model = from_checkpoint(base_model, checkpoint, os.fspath(source), tasks)
    try:
        yield model
    finally:
        model.unload()
