"""Inventories of other programs: reading them safely, and attaching them to a base model.

Shape letters: T tasks, H heads, K skills, r rank.
"""

import argparse
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.build import attach
from polyroute.config import MHRConfig
from polyroute.errors import InputError, did_you_mean
from polyroute.host.dtypes import are_finite_fractions
from polyroute.host.files import read_json
from polyroute.host.paths import check_readable, expanded
from polyroute.host.texts import read_text
from polyroute.layer.sites import find_endings, named_sites
from polyroute.model import RoutedModel
from polyroute.routes.ragged import RaggedInventory
from polyroute.routes.table_rules import rule_of
from polyroute.routes.tasks import check_list
from polyroute.settings import marked

__all__ = [
    "NAMES",
    "ForeignInventory",
    "check_exportable",
    "check_plain",
    "read_names",
    "read_pickle",
    "routed_model",
]

NAMES = "tasks.json"
"""The file of an export for the names of tasks, which the other formats do not hold."""
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
]
"""The types that a pickle may hold besides tensors, plain values and their containers."""

EXAMINED = {
    "method", "adapter", "rank", "alpha", "combine", "gate", "normalization", "logit_dropout",
    "shared_skill",
}  # fmt: skip
"""The settings that each writer holds or refuses itself. A setting that is not here is refused by
all of them, so a new one cannot be lost."""


@dataclass(frozen=True)
class ForeignInventory:
    """An inventory from a reader, in the layout of our own checkpoints."""

    source: str
    """The path that it was read from, for error messages."""
    config: MHRConfig
    """All settings except `target_modules`."""
    skills: Mapping[str, Tensor]
    """`<layer>.lora_a` `[H, K, d_in/H, r]` and `<layer>.lora_b` `[H, K, r, d_out/H]`, or
    `<layer>.ia3` `[H, K, 1, d_out/H]`."""
    logits: Mapping[str, Tensor]
    """By layer, `[T, H * K]`, for at least one layer of each router; empty if tasks are not routed
    or all take the average."""
    num_tasks: int = 1
    """The number of tasks, if there are no logits."""

    @property
    def layers(self) -> set[str]:
        """The names of the adapted layers."""
        return {name.rpartition(".")[0] for name in self.skills} | set(self.logits)


def routed_model(
    base_model: nn.Module, found: ForeignInventory, tasks: Sequence[str] | None = None
) -> RoutedModel:
    """Attach an inventory from a reader to its base model.

    Args:
        base_model: the model that it was trained on. The formats do not identify it, so only names
            and widths of layers can be compared.
        found: the inventory.
        tasks: names of the tasks, in row order; by default `task-0000`, `task-0001` and so on.

    Raises:
        InputError: the inventory does not fit the base model, its tensors do not fit together, or
            the number of names is not the number of rows.
    """
    order = [name for name, _ in base_model.named_modules(remove_duplicate=False)]
    layers = [name for name in order if name in found.layers]
    other = f"{found.source} belongs to another base model"
    unknown = sorted(found.layers - set(layers))
    if unknown:
        raise InputError(
            f"{other}: {type(base_model).__name__} has no layer {unknown[0]!r}; "
            f"{did_you_mean(unknown[0], order)}"
        )
    names = _task_names(found, tasks)
    try:
        sites = named_sites(base_model, layers, found.config)
    except InputError as error:
        raise InputError(f"{other}: {error}") from error
    endings = tuple(find_endings(base_model, sites))
    config = replace(found.config, target_modules=endings)
    model = attach(base_model, config, names, sites=layers)
    try:
        _fill(model, found)
    except BaseException:
        model.unload()
        raise
    return model


@torch.no_grad()
def _fill(model: RoutedModel, found: ForeignInventory) -> None:
    for i, site in enumerate(model.sites):
        for factor, tensor in model.inventory.site_tensors(i).items():
            name = f"{site.name}.{factor}"
            if name not in found.skills:
                raise InputError(f"{found.source} lacks the tensor {name!r}; it is not whole")
            _copy(tensor, found.skills[name], name, found.source)
    table, shape = model.routes.logits, model.routes.shape
    if not found.logits:
        model.routes.drop_logits()
    elif table is not None and shape is not None:
        by_router = table.view(len(model.tasks), shape[0], -1)
        for router, name in enumerate(model.routers):
            layers = [
                site.name
                for site, r in zip(model.sites, model.mixer.router_of_site, strict=True)
                if r == router and site.name in found.logits
            ]
            if not layers:
                raise InputError(
                    f"{found.source} lacks the routing logits of {name!r}; it is not whole"
                )
            first, *others = (found.logits[layer] for layer in layers)
            if any(not torch.equal(first, logits) for logits in others):
                raise InputError(
                    f"{found.source} has different routing logits for {layers[0]!r} and another "
                    f"layer of {name!r}, which share a router; its granularity must be different"
                )
            _copy(by_router[:, router], first, f"{layers[0]}, routing logits", found.source)


def _copy(to: Tensor, values: Tensor, name: str, source: str) -> None:
    if values.shape != to.shape:
        raise InputError(
            f"{source} does not fit: {name!r} has shape {list(values.shape)}, but "
            f"{list(to.shape)} is needed; check the base model and the format"
        )
    if not are_finite_fractions(values):
        raise InputError(
            f"{source} is damaged: {name!r} holds values that are not finite fractional numbers"
        )
    to.copy_(values)


def _task_names(found: ForeignInventory, tasks: Sequence[str] | None) -> list[str]:
    rows = next((len(logits) for logits in found.logits.values()), None)
    check_list(tasks)
    if tasks is None:
        count = found.num_tasks if rows is None else rows
        digits = max(4, len(str(count - 1)))
        return [f"task-{row:0{digits}}" for row in range(count)]
    if rows is not None and len(tasks) != rows:
        raise InputError(
            f"{len(tasks)} task names were given for the {rows} routing rows of {found.source}; "
            "give one for each row, in its order"
        )
    return list(tasks)


def check_plain(model: RoutedModel, program: str) -> None:
    """Make sure that skills and a routing table are all that an inventory consists of.

    Raises:
        InputError: it has a rule of its own, LoRAs of different ranks, whole modules that trained,
            or an output layer that was resized; or the model is merged. The message names the
            program.
    """
    model.check_unmerged()
    if model.rule.name != rule_of(model.adapter_config).name:
        raise InputError(f"{program} has no rule {model.rule.name!r}, which this inventory uses")
    if isinstance(model.inventory, RaggedInventory):
        raise InputError(
            f"{program} cannot hold LoRAs of different ranks; write each task with --format peft"
        )
    if model.wrapping.trained:
        raise InputError(
            f"{program} cannot hold the modules that were trained beside the skills "
            f"({', '.join(sorted(model.wrapping.trained))}); write each task with --format peft"
        )
    for site in model.sites:
        if site.out_features != site.d_out:
            raise InputError(
                f"{program} cannot hold skills for {site.d_out} of the {site.out_features} outputs "
                f"of layer {site.name!r}; write each task with --format peft"
            )


def check_exportable(model: RoutedModel, program: str) -> None:
    """Make sure that an inventory has no property that the other programs lack.

    Raises:
        InputError: it has one; the message names the program.
    """
    check_plain(model, program)
    for name in set(marked(MHRConfig, "computes")) - EXAMINED:
        value = getattr(model.adapter_config, name)
        if value != getattr(MHRConfig(), name):
            raise InputError(
                f"{program} has no setting {name!r}, and this inventory has {name}={value!r}; "
                "write each task with --format peft"
            )
    if model.adapter_config.combine == "output":
        raise InputError(
            f"{program} averages the factors of skills, and this inventory combines what they add "
            "(combine='output'); write each task with --format peft"
        )
    if model.adapter_config.normalization == "none":
        raise InputError(
            f"{program} normalises weights, and this inventory does not (normalization='none'); "
            "write each task with --format peft"
        )
    if model.adapter_config.method == "private":
        raise InputError(
            f"{program} cannot hold private adapters; write each task with --format peft"
        )
    if model.mixer.anneal_progress:
        raise InputError(
            f"{program} cannot hold routing that was moved toward the average by anneal_steps; "
            "write each task with --format peft"
        )
    for site in model.sites:
        if not isinstance(site.layer, nn.Linear):
            raise InputError(
                f"{program} adapts only ordinary linear layers, and {site.name!r} is a "
                f"{type(site.layer).__name__}; write each task with --format peft"
            )


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Read the names of tasks from a JSON list or from a text with one name per line.

    Raises:
        InputError: the file cannot be read, or holds no names.
    """
    file = expanded(path)
    if file.suffix == ".json":
        names = read_json(file)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{file} must be a JSON list of task names")
    else:
        try:
            lines = read_text(file).split("\n")
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text; give one task name per line") from error
        names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{file} names no task; give one name for each routing row")
    return names


def read_pickle(path: Path, *, allowed: bool) -> dict[str, Any]:
    """Read a file of `torch.save` without running any code in it.

    Only tensors, plain values and the types in `HARMLESS` are built; anything else is refused.

    Args:
        path: the file.
        allowed: whether the user has allowed pickles to be read.

    Raises:
        InputError: pickles are not allowed, or the file is missing or damaged or holds another
            type.
    """
    check_readable(path)
    if not allowed:
        raise InputError(
            f"{path} is a pickle, which is read only if you allow it: add --allow-pickle "
            "(allow_pickle=True in Python); no code in it will be run"
        )
    try:
        with torch.serialization.safe_globals(HARMLESS):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        global_ = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, UnpicklingError) and global_:
            raise InputError(
                f"{path} was not loaded, and nothing in it was run: it holds {global_[1]}, which "
                "may be code; save only its tensors and plain values"
            ) from error
        raise InputError(f"{path} is not a whole file of torch.save") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a checkpoint")
    return value
