"""Making routed models: from a base model and settings, or from a saved inventory."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.layer.routed_layer import RoutedLayer
from polyroute.layer.sites import Site, find_sites, fits_sample, named_sites
from polyroute.model import RoutedModel
from polyroute.saved.checkpoint import Checkpoint, read_checkpoint
from polyroute.saved.hub import DESCRIPTION, FILES, SKILLS, locate

__all__ = ["attach", "from_checkpoint", "from_pretrained", "loaded"]


def attach(
    base_model: nn.Module,
    config: MHRConfig,
    tasks: Iterable[str],
    *,
    sites: Sequence[str] | None = None,
) -> RoutedModel:
    """Give a base model an inventory of skills and a route for each task.

    The base model's parameters are frozen. Its chosen layers are wrapped in place, without
    touching their weights; `RoutedModel.unload` undoes it.

    Args:
        base_model: any tree of torch modules that takes its batch on the first axis.
        config: what to attach.
        tasks: unique names; the order is the order of rows.
        sites: exact layer names, instead of `config.target_modules`.

    Raises:
        InputError: no layer matches, heads do not divide a width, task names clash, or the model
            has an inventory, or an adapter of `polyroute.peft`, already.
    """
    if not isinstance(base_model, nn.Module):
        raise InputError(f"base_model must be a torch module, not a {type(base_model).__name__}")
    if not isinstance(config, MHRConfig):
        raise InputError(
            f"config must be an MHRConfig, not a {type(config).__name__}: write MHRConfig(...)"
        )
    if not isinstance(tasks, Iterable) or isinstance(tasks, set | frozenset):
        raise InputError(f"tasks must be a list of names, not {tasks!r}: its order is that of rows")
    if isinstance(tasks, str):
        raise InputError(f"tasks must be a list of names, not the single string {tasks!r}")
    tasks = tuple(tasks)
    if config.method == "private" and not tasks:
        raise InputError("method='private' has one skill per task: name at least one task")
    for name, module in base_model.named_modules():
        if isinstance(module, RoutedLayer | RoutedModel):
            raise InputError(
                f"layer {name!r} carries an inventory already; call unload() on the routed model"
            )
        if hasattr(module, "mhr_adapters"):  # of `polyroute.peft`, which needs PEFT
            raise InputError(
                f"layer {name!r} carries an adapter of polyroute.peft: call unload() on the PEFT "
                "model, or save the adapter and convert it to an inventory"
            )
    found = (
        find_sites(base_model, config) if sites is None else named_sites(base_model, sites, config)
    )
    return RoutedModel(base_model, config, found, tasks)


def from_pretrained(
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
        folder: where `RoutedModel.save_pretrained` wrote; or where there is no such folder an id on
            the hub, `user/inventory`.
        tasks: load only these tasks' routes, `[]` for none; default all. The rows of others are
            not read, and parts of the table that hold none of them are not fetched.
        check_base: refuse a base model whose weights differ from those of training.
        revision: a branch, a tag or a commit of the hub; default its main branch.
        token: for the hub, instead of the one that is logged in; False for none.
        cache_dir: of the hub, instead of its usual one.
        local_files_only: take what is in the hub's cache, without network.

    Raises:
        InputError: the files are damaged, or belong to another base model, or cannot be had.
    """
    place = locate(
        folder, FILES if tasks is None else (DESCRIPTION, SKILLS), revision=revision, token=token,
        cache_dir=cache_dir, local_files_only=local_files_only,
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
    """Build a routed model from a saved inventory; see `from_pretrained`."""
    description, table = checkpoint.description, checkpoint.saved_routes
    sites = description["sites"]
    router_of = {site["name"]: description["routers"][site["router"]] for site in sites}
    values = dict(description["config"])
    granularity = values.pop("granularity")
    # The saved assignment of layers to routers, whatever rule made it, holds.
    config = replace(MHRConfig.from_dict(values), granularity=router_of.__getitem__)
    try:
        found = named_sites(base_model, list(router_of), config)
    except InputError as error:
        raise InputError(f"{source} belongs to another base model: {error}") from error
    for site, saved in zip(found, sites, strict=True):
        if (site.d_in, site.d_out) != (saved["d_in"], saved["d_out"]):
            raise InputError(
                f"{source} belongs to another base model: layer {site.name!r} is "
                f"{site.d_in} to {site.d_out} here, {saved['d_in']} to {saved['d_out']} there"
            )
    if check_base:
        _check_weights(base_model, found, description, source)
    if isinstance(tasks, str):
        raise InputError(f"tasks must be a list of names, not the single string {tasks!r}")
    # Private adapters are skills, which are in one file: all are loaded, then some are kept.
    loaded_tasks = checkpoint.tasks if tasks is None or table is None else tuple(tasks)
    model = attach(base_model, config, loaded_tasks, sites=[s.name for s in found])
    if granularity != "custom":
        model.mixer.config = replace(config, granularity=granularity)
    try:
        model.load_tensors(checkpoint, source)
        if tasks is not None and table is None:
            model.keep_tasks(tasks)
    except BaseException:
        model.unload()
        raise
    return model


def _check_weights(
    base_model: nn.Module, sites: Sequence[Site], description: Mapping[str, Any], source: str
) -> None:
    """Make sure that the base model's weights are those that the inventory was trained on."""
    saved = description["sites"]
    compared = [
        (f"layer {site.name!r}", site.weight, s["base_sample"], s.get("base_dtype"))
        for site, s in zip(sites, saved, strict=True)
    ]
    parameters = dict(base_model.named_parameters())
    for other in description["base"].get("sample", []):
        weight = parameters.get(other["name"])
        if weight is not None:  # sites were all found; a part that is not there cannot differ
            compared.append(
                (f"parameter {other['name']!r}", weight, other["values"], other["dtype"])
            )
    for what, tensor, sample, dtype in compared:
        if not fits_sample(tensor, sample, dtype):
            raise InputError(
                f"{source} belongs to another base model: the weights of {what} "
                "differ from those it was trained on (check_base=False loads it all the same)"
            )


@contextmanager
def loaded(
    base_model: nn.Module, checkpoint: Checkpoint, source: str | os.PathLike[str]
) -> Iterator[RoutedModel]:
    """For a `with` block: a saved inventory on its base model, which is then left as it was."""
    model = from_checkpoint(base_model, checkpoint, os.fspath(source))
    try:
        yield model
    finally:
        model.unload()
