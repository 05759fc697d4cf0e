"""The files of a saved inventory: JSON for what it is, safetensors for the numbers.

    polyroute.json           format, config, tasks, sites, routers
    inventory.safetensors    <site>.lora_a [H, K, d_in/H, r], <site>.lora_b [H, K, r, d_out/H]
    routes.safetensors       rows [T, N * H * K]

The factors are in the layout of the published checkpoints, one tensor per layer, so that other
programs can read them. Nothing here is ever unpickled.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.files import make_folder, read_json, read_tensors, write_json, write_tensors
from polyroute.targets import SAMPLED

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]

FORMAT = 1
DESCRIPTION = "polyroute.json"
SKILLS = "inventory.safetensors"
ROWS = "routes.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A saved inventory, in memory."""

    description: dict[str, Any]
    skills: dict[str, Tensor]
    rows: Tensor | None
    """`[T, N * H * K]`, or None where tasks have no logits."""


def write_checkpoint(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write all files; the description last, so that an interrupted write is not mistaken for one.

    Raises:
        InputError: the folder cannot be made or written.
    """
    path = make_folder(folder)
    write_tensors(path / SKILLS, checkpoint.skills)
    if checkpoint.rows is not None:
        write_tensors(path / ROWS, {"rows": checkpoint.rows})
    else:
        (path / ROWS).unlink(missing_ok=True)
    write_json(path / DESCRIPTION, {"format": FORMAT, **checkpoint.description})


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The inverse of `write_checkpoint`.

    Raises:
        InputError: the folder holds no inventory, or a file is damaged or of another kind.
    """
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        raise InputError(f"{path} holds no inventory: there is no {DESCRIPTION} in it")
    description = read_json(path / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(
            f"{path / DESCRIPTION} is not in inventory format {FORMAT}; "
            "it may come from another version of polyroute"
        )
    for key in ("config", "num_skills", "base", "tasks", "sites", "routers"):
        if key not in description:
            raise InputError(f"{path / DESCRIPTION} lacks the entry {key!r}; it is damaged")
    try:
        _check_description(description)
    except InputError as error:
        raise InputError(f"{path / DESCRIPTION} is damaged: {error}") from error
    has_rows = description.get("has_rows", False)
    if not isinstance(has_rows, bool) or ("has_rows" not in description and (path / ROWS).exists()):
        raise InputError(
            f"{path / DESCRIPTION} is damaged: 'has_rows' does not say whether {ROWS} belongs to it"
        )
    rows = None
    if has_rows:
        rows = read_tensors(path / ROWS).get("rows")
        if rows is None or rows.dim() != 2 or len(rows) != len(description["tasks"]):
            raise InputError(
                f"{path / ROWS} does not hold one row for each of the "
                f"{len(description['tasks'])} tasks of {DESCRIPTION}"
            )
    return Checkpoint(description, read_tensors(path / SKILLS), rows)


def _check_description(description: dict[str, Any]) -> None:
    """Make sure that every entry is of the type that the library writes.

    Raises:
        InputError: one is not; the message names it and not the file.
    """
    tasks, routers, sites = (description[key] for key in ("tasks", "routers", "sites"))
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
