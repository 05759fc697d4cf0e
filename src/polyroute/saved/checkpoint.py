"""The files of a saved inventory: JSON for what it is, safetensors for the numbers.

    polyroute.json           format, id, config, sites, routers; rows, or where there are none tasks
    inventory.safetensors    <site>.lora_a [H, K, d_in/H, r], <site>.lora_b [H, K, r, d_out/H]
    modules.safetensors      rule.<parameter>, module.<name>: what else trained; if there is any
    routes-*.safetensors     the tasks and their rows, see `polyroute.saved.shards`

The factors are in the layout of the published checkpoints, one tensor per layer, so that other
programs can read them. Nothing here is ever unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.host.files import make_folder, read_metadata, read_tensors, write_json, write_tensors
from polyroute.layer.fingerprint import SAMPLED
from polyroute.saved.hub import DESCRIPTION, MODULES, SHARDS, SKILLS
from polyroute.saved.rows import FORMAT, SavedRoutes, read_description
from polyroute.saved.shards import NOTE, write_rows

__all__ = ["Checkpoint", "Content", "read_checkpoint", "write_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A saved inventory: its description and skills; its routing table stays on disk."""

    description: Mapping[str, Any]
    skills: Mapping[str, Tensor]
    saved_routes: SavedRoutes | None
    """None where tasks have no logits."""
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    """The parameters of the rule, `rule.*`, and of whole modules that trained, `module.*`."""

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in order.

        Raises:
            InputError: a file of the routing table is damaged.
        """
        if self.saved_routes is None:
            return tuple(self.description["tasks"])
        return tuple(self.saved_routes.names())

    def rows(self, tasks: Sequence[str]) -> Tensor | None:
        """The logits of some tasks, `[T, N * H * K]`, fp32; None where tasks have none.

        Raises:
            InputError: no such task, or a file of the routing table is damaged.
        """
        if self.saved_routes is None:
            return None
        table = torch.empty(len(tasks), self.saved_routes.width)
        self.saved_routes.copy_into(table, tasks)
        return table


@dataclass(frozen=True)
class Content:
    """What a saved inventory consists of."""

    description: Mapping[str, Any]
    """What the inventory is; tasks and rows are added when it is written."""
    skills: Mapping[str, Tensor]
    """The factors, by layer."""
    modules: Mapping[str, Tensor]
    """As in `Checkpoint`."""
    tasks: Sequence[str]
    """Names, in row order."""
    rows: Tensor | None
    """The routing table `[T, N * H * K]`, or None."""
    shape: tuple[int, int, int] | None
    """`(N, H, K)` of a row, or None."""

    def identity(self) -> str:
        """A number that the content gives: equal inventories have equal ones."""
        described = [self.description, list(self.tasks)]
        total = hashlib.sha256(json.dumps(described).encode())
        rows = [] if self.rows is None else [self.rows]
        for tensor in (*self.skills.values(), *self.modules.values(), *rows):
            # A large table on a CPU is hashed where it is; layers are copied one by one.
            flat = tensor.detach().cpu().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
        return total.hexdigest()[:16]


def write_checkpoint(folder: str | os.PathLike[str], content: Content) -> None:
    """Write all files, the description last.

    All carry one id, which their content gives, so what an interrupted write left beside older
    files is noticed when it is read.

    Args:
        folder: where; made if missing.
        content: what is written.

    Raises:
        InputError: the folder cannot be made or written.
    """
    path = make_folder(folder)
    identity = content.identity()
    note = {NOTE: json.dumps({"id": identity})}
    write_tensors(path / SKILLS, content.skills, metadata=note)
    if content.modules:
        write_tensors(path / MODULES, content.modules, metadata=note)
    shards: list[Path] = []
    table: dict[str, Any] = {"rows": None, "tasks": list(content.tasks)}
    if content.rows is not None and content.shape is not None:
        shards = write_rows(path, content.tasks, content.rows, identity)
        table = {"rows": {"shards": len(shards), "shape": list(content.shape)}}
    described = {"format": FORMAT, "id": identity, **content.description, **table}
    write_json(path / DESCRIPTION, described)
    for former in set(path.glob(SHARDS)) - set(shards):
        former.unlink(missing_ok=True)
    if not content.modules:
        (path / MODULES).unlink(missing_ok=True)


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The inverse of `write_checkpoint`; the routing table is read when it is asked for.

    Raises:
        InputError: the folder holds no inventory, or a file is damaged or of another kind.
    """
    path = Path(folder)
    description = read_description(path)
    for key in ("id", "config", "num_skills", "base", "rows", "sites", "routers"):
        if key not in description:
            raise InputError(f"{path / DESCRIPTION} lacks the entry {key!r}; it is damaged")
    if description["rows"] is None and "tasks" not in description:
        raise InputError(f"{path / DESCRIPTION} lacks the entry 'tasks'; it is damaged")
    saved_routes = None if description["rows"] is None else SavedRoutes(folder)
    try:
        _check_description(description)
    except InputError as error:
        raise InputError(f"{path / DESCRIPTION} is damaged: {error}") from error
    files = [SKILLS, MODULES] if description.get("modules") else [SKILLS]
    for name in files:
        if read_metadata(path / name).get(NOTE) != json.dumps({"id": description["id"]}):
            raise InputError(
                f"{path / name} and {DESCRIPTION} are of two saves, so one was interrupted; save "
                "the inventory again, or take an earlier checkpoint"
            )
    skills, *modules = (read_tensors(path / name) for name in files)
    return Checkpoint(description, skills, saved_routes, *modules)


def _check_description(description: dict[str, Any]) -> None:
    """Make sure that every entry is of the type that the library writes.

    Raises:
        InputError: one is not; the message names it and not the file.
    """
    tasks = description.get("tasks", [])
    routers, sites = description["routers"], description["sites"]
    for name, values in (("tasks", tasks), ("routers", routers), ("sites", sites)):
        _expect(isinstance(values, list), name, "a list")
    _expect(all(isinstance(t, str) and t for t in tasks), "tasks", "a list of names")
    _expect(all(isinstance(r, str | int) for r in routers), "routers", "a list of names")
    config = description["config"]
    _expect(isinstance(config, dict), "config", "an object")
    for key in ("method", "adapter", "num_heads", "rank", "granularity"):
        _expect(key in config, "config", f"complete: it lacks {key!r}")
    named = {**config}
    if config["granularity"] == "custom":
        del named["granularity"]
    settings = MHRConfig.from_dict(named)
    skills = len(tasks) if settings.num_skills is None else settings.num_skills
    _expect(description["num_skills"] == skills, "num_skills", f"{skills}, as its config says")
    rule = description.get("rule")
    if rule is not None:
        whole = isinstance(rule, dict) and isinstance(rule.get("name"), str)
        _expect(whole and isinstance(rule.get("settings"), dict), "rule", "a name and settings")
    if description["rows"] is not None:
        shape = [len(routers), settings.heads, description["num_skills"]]
        _expect(description["rows"]["shape"] == shape, "rows.shape", f"{shape}, as it must be")
    progress = description.get("anneal_progress", 0.0)
    _expect(_is_number(progress) and 0 <= progress <= 1, "anneal_progress", "between 0 and 1")
    _expect(bool(sites), "sites", "a list of at least one layer")
    for i, site in enumerate(sites):
        _check_site(f"sites[{i}]", site, len(routers))
    base = description["base"]
    _expect(isinstance(base, dict) and {"name", "class"} <= base.keys(), "base", "name and class")
    others = base.get("sample", [])
    _expect(isinstance(others, list), "base.sample", "a list")
    for other in others:
        whole = isinstance(other, dict) and {"name", "dtype", "values"} <= other.keys()
        _expect(whole and _is_sample(other["values"]), "base.sample", "a list of whole samples")


def _check_site(place: str, site: Any, num_routers: int) -> None:
    needed = ("name", "d_in", "d_out", "router", "base_sample")
    _expect(isinstance(site, dict), place, "an object")
    for key in needed:
        _expect(key in site, place, f"complete: it lacks {key!r}")
    _expect(isinstance(site["name"], str), f"{place}.name", "a layer name")
    for key in ("d_in", "d_out"):
        _expect(_is_whole(site[key]) and site[key] > 0, f"{place}.{key}", "a width")
    is_router = _is_whole(site["router"]) and 0 <= site["router"] < num_routers
    _expect(is_router, f"{place}.router", f"one of its {num_routers} routers")
    _expect(_is_sample(site["base_sample"]), f"{place}.base_sample", f"{SAMPLED} numbers, or null")
    wide = site.get("out_features", site["d_out"])
    _expect(_is_whole(wide) and wide > 0, f"{place}.out_features", "a width")


def _expect(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise InputError(f"{name!r} is not {what}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


def _is_sample(values: object) -> bool:
    return values is None or (
        isinstance(values, list) and len(values) == SAMPLED and all(map(_is_number, values))
    )
