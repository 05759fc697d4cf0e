"""The files of a saved inventory: JSON for its description, safetensors for its numbers.

    polyroute.json           format, id, config, sites, routers; rows, or tasks if they have no rows
    inventory.safetensors    <site>.lora_a [H, K, d_in/H, r], <site>.lora_b [H, K, r, d_out/H];
                             of skills of any ranks [R, d_in], [R, d_out], see `routes.ragged`
    modules.safetensors      rule.<parameter>, module.<name>; only if either has trained
    routes-*.safetensors     the tasks and their rows, see `polyroute.saved.shards`

The factors have the layout of the published checkpoints, one tensor per layer, so that other
programs can read them. Nothing here is ever unpickled.

Shape letters: T tasks, N routers, H heads, K skills, r rank.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyroute.config import CUSTOM, MHRConfig
from polyroute.errors import InputError
from polyroute.host.files import make_folder, read_metadata, read_tensors, write_json, write_tensors
from polyroute.host.json_text import parse_json
from polyroute.host.paths import path_of
from polyroute.layer.fingerprint import SAMPLED
from polyroute.saved.digests import SHA256, described_digest, digest_of
from polyroute.saved.hub import DESCRIPTION, MODULES, SHARDS, SKILLS
from polyroute.saved.rows import FORMAT, SavedRoutes, lock_inventory, read_description
from polyroute.saved.shards import NOTE, write_rows

__all__ = ["Checkpoint", "Content", "read_checkpoint", "saved_config", "write_checkpoint"]

NEEDED = ("id", "config", "num_skills", "base", "rows", "sites", "routers")
"""The entries that each description has."""
ENTRIES = {*NEEDED, "format", "tasks", "rule", "modules", "anneal_progress", SHA256}
"""All that a description can have."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved inventory: its description and its skills; the routing table stays on disk."""

    description: Mapping[str, Any]
    """The contents of `polyroute.json`."""
    skills: Mapping[str, Tensor]
    """The factors, `<site>.<factor>`."""
    saved_routes: SavedRoutes | None
    """The routing table on disk; None if tasks have no rows."""
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

    def check_rows(self) -> None:
        """Read the whole routing table, if there is one, and compare it with its digests.

        Raises:
            InputError: a file of it is damaged.
        """
        if self.saved_routes is not None:
            self.saved_routes.check(self.tasks)

    def rows(self, tasks: Sequence[str]) -> Tensor | None:
        """The rows of some tasks, `[T, N * H * K]`, fp32; None if tasks have no rows.

        Raises:
            InputError: there is no such task, or a file of the routing table is damaged.
        """
        if self.saved_routes is None:
            return None
        table = torch.empty(len(tasks), self.saved_routes.width)
        self.saved_routes.copy_into(table, tasks)
        return table


@dataclass(frozen=True)
class Content:
    """The parts of an inventory that are written."""

    description: Mapping[str, Any]
    """The entries of `polyroute.json`, without those for format, id, tasks and rows."""
    skills: Mapping[str, Tensor]
    """The factors, `<site>.<factor>`."""
    modules: Mapping[str, Tensor]
    """As in `Checkpoint`."""
    tasks: Sequence[str]
    """Names, in row order."""
    rows: Tensor | None
    """The routing table `[T, N * H * K]`, or None."""
    shape: tuple[int, int, int] | None
    """The shape `(N, H, K)` of a row, or None."""

    def identity(self, digests: Mapping[str, str]) -> str:
        """A hash of the content, equal for equal inventories.

        Args:
            digests: those of `skills` and `modules`, by file.
        """
        rows = {} if self.rows is None else {"rows": self.rows}
        return digest_of(rows, self.description, list(self.tasks), digests)[:16]


def write_checkpoint(folder: str | os.PathLike[str], content: Content) -> None:
    """Write all files, the description last.

    All files carry one id, a hash of the content. If an interrupted write left new files beside
    older ones, `read_checkpoint` therefore notices it.

    Args:
        folder: the folder to write to; made if missing.
        content: the inventory.

    Raises:
        InputError: the folder cannot be made or written.
    """
    path = make_folder(folder)
    former = lock_inventory(path) if (path / DESCRIPTION).is_file() else nullcontext()
    with former:
        _write(path, content)


def _write(path: Path, content: Content) -> None:
    parts = {SKILLS: content.skills, **({MODULES: content.modules} if content.modules else {})}
    digests = {name: digest_of(tensors) for name, tensors in parts.items()}
    identity = content.identity(digests)
    for name, tensors in parts.items():
        note = json.dumps({"id": identity, SHA256: digests[name]})
        write_tensors(path / name, tensors, metadata={NOTE: note})
    shards: list[Path] = []
    table: dict[str, Any] = {"rows": None, "tasks": list(content.tasks)}
    if content.rows is not None and content.shape is not None:
        shards = write_rows(path, content.tasks, content.rows, identity)
        table = {"rows": {"shards": len(shards), "shape": list(content.shape)}}
    described = {"format": FORMAT, "id": identity, **content.description, **table}
    write_json(path / DESCRIPTION, {**described, SHA256: described_digest(described)})
    for old in set(path.glob(SHARDS)) - set(shards):
        old.unlink(missing_ok=True)
    if not content.modules:
        (path / MODULES).unlink(missing_ok=True)


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read what `write_checkpoint` wrote; the routing table is read only when it is asked for.

    Raises:
        InputError: the folder holds no inventory, or a file is damaged or of another format.
    """
    path = path_of(folder)
    description = read_description(path)
    for key in NEEDED:
        if key not in description:
            raise InputError(f"{path / DESCRIPTION} lacks the entry {key!r}; it is damaged")
    unknown = sorted(description.keys() - ENTRIES)
    if unknown:
        raise InputError(
            f"{path / DESCRIPTION} has the entry {unknown[0]!r}, which this version does not know: "
            "upgrade polyroute"
        )
    if description["rows"] is None and "tasks" not in description:
        raise InputError(f"{path / DESCRIPTION} lacks the entry 'tasks'; it is damaged")
    saved_routes = None if description["rows"] is None else SavedRoutes(folder)
    try:
        _check_description(description)
    except InputError as error:
        raise InputError(f"{path / DESCRIPTION} is damaged: {error}") from error
    files = [SKILLS, MODULES] if description.get("modules") else [SKILLS]
    skills, *modules = (_tensors(path / name, description) for name in files)
    return Checkpoint(description, skills, saved_routes, *modules)


def _tensors(path: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        InputError: the file is damaged, or belongs to another save.
    """
    text = read_metadata(path).get(NOTE, "{}")
    note = parse_json(text, f"the note in {path}", "take an earlier checkpoint")
    if not isinstance(note, dict) or note.get("id") != description["id"]:
        raise InputError(
            f"{path} and {DESCRIPTION} are of two saves, so one was interrupted; save the "
            "inventory again, or take an earlier checkpoint"
        )
    tensors = read_tensors(path)
    # Older versions wrote no digests.
    expected = digest_of(tensors) if SHA256 in description else None
    if note.get(SHA256) != expected:
        raise InputError(
            f"{path} is damaged: it does not hold what was saved; take an earlier checkpoint"
        )
    return tensors


def saved_config(description: Mapping[str, Any]) -> MHRConfig:
    """The settings of a saved inventory.

    A granularity that was a function is not saved; the settings then have the default.

    Raises:
        InputError: a setting does not exist or is out of range.
    """
    values = dict(description["config"])
    if values["granularity"] == CUSTOM:
        del values["granularity"]
    return MHRConfig.from_dict(values)


def _check_description(description: dict[str, Any]) -> None:
    """Make sure that every entry has the type that the library writes.

    Raises:
        InputError: an entry has another type; the message names the entry but not the file.
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
    settings = saved_config(description)
    skills = settings.skills_for(len(tasks))
    _expect(description["num_skills"] == skills, "num_skills", f"{skills}, as its config says")
    rule = description.get("rule")
    if rule is not None:
        is_named = isinstance(rule, dict) and isinstance(rule.get("name"), str)
        _expect(is_named and isinstance(rule.get("settings"), dict), "rule", "a name and settings")
    if description["rows"] is not None:
        shape = [len(routers), settings.heads, description["num_skills"]]
        _expect(description["rows"]["shape"] == shape, "rows.shape", f"{shape}, as it must be")
    progress = description.get("anneal_progress", 0.0)
    _expect(_is_number(progress) and 0 <= progress <= 1, "anneal_progress", "between 0 and 1")
    _expect(bool(sites), "sites", "a list of at least one layer")
    for i, site in enumerate(sites):
        _check_site(f"sites[{i}]", site, len(routers))
        if "ranks" in sites[0] or "ranks" in site:
            _check_ranks(f"sites[{i}].ranks", site.get("ranks"), skills)
    base = description["base"]
    _expect(isinstance(base, dict) and {"name", "class"} <= base.keys(), "base", "name and class")
    others = base.get("sample", [])
    _expect(isinstance(others, list), "base.sample", "a list")
    for other in others:
        is_whole = isinstance(other, dict) and {"name", "dtype", "values"} <= other.keys()
        is_whole = is_whole and _is_sample(other["values"]) and _is_norm(other.get("norm"))
        _expect(is_whole, "base.sample", "a list of whole samples")


def _check_site(place: str, site: Any, num_routers: int) -> None:
    _expect(isinstance(site, dict), place, "an object")
    for key in ("name", "d_in", "d_out", "router", "base_sample"):
        _expect(key in site, place, f"complete: it lacks {key!r}")
    _expect(isinstance(site["name"], str), f"{place}.name", "a layer name")
    for key in ("d_in", "d_out"):
        _expect(_is_whole(site[key]) and site[key] > 0, f"{place}.{key}", "a width")
    is_router = _is_whole(site["router"]) and 0 <= site["router"] < num_routers
    _expect(is_router, f"{place}.router", f"one of its {num_routers} routers")
    _expect(_is_sample(site["base_sample"]), f"{place}.base_sample", f"{SAMPLED} numbers, or null")
    _expect(_is_norm(site.get("base_norm")), f"{place}.base_norm", "a number, or null")
    width = site.get("out_features", site["d_out"])
    _expect(_is_whole(width) and width > 0, f"{place}.out_features", "a width")


def _check_ranks(place: str, ranks: Any, skills: int) -> None:
    is_list = isinstance(ranks, list) and all(_is_whole(rank) and rank >= 0 for rank in ranks)
    _expect(is_list and len(ranks) == skills, place, f"the ranks of {skills} skills")


def _expect(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise InputError(f"{name!r} is not {what}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


def _is_norm(value: object) -> bool:
    return value is None or (_is_number(value) and value >= 0)  # type: ignore[operator]


def _is_sample(values: object) -> bool:
    return values is None or (
        isinstance(values, list) and len(values) == SAMPLED and all(map(_is_number, values))
    )
