"""The files of a saved inventory: JSON for what it is, safetensors for the numbers.

    polyroute.json           format, config, tasks, sites, routers
    inventory.safetensors    <site>.lora_a [H, K, d_in/H, r], <site>.lora_b [H, K, r, d_out/H]
    routes.safetensors       rows [T, N * H * K]

The factors are in the layout of the published checkpoints, one tensor per layer, so that other
programs can read them. Nothing here is ever unpickled.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyroute.errors import InputError
from polyroute.files import make_folder, read_json, read_tensors, write_json, write_tensors

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
    for key in ("config", "tasks", "sites", "routers"):
        if key not in description:
            raise InputError(f"{path / DESCRIPTION} lacks the entry {key!r}; it is damaged")
    if not _is_whole(description):
        raise InputError(f"{path / DESCRIPTION} is damaged: its config or a site is incomplete")
    rows = None
    if description.get("has_rows"):
        rows = read_tensors(path / ROWS).get("rows")
        if rows is None or len(rows) != len(description["tasks"]):
            raise InputError(
                f"{path / ROWS} does not hold one row for each of the "
                f"{len(description['tasks'])} tasks of {DESCRIPTION}"
            )
    return Checkpoint(description, read_tensors(path / SKILLS), rows)


def _is_whole(description: dict[str, Any]) -> bool:
    config, routers = description["config"], description["routers"]
    needed = {"name", "d_in", "d_out", "router", "base_sample"}
    return (
        isinstance(config, dict)
        and "granularity" in config
        and isinstance(description["tasks"], list)
        and all(
            isinstance(site, dict)
            and needed <= site.keys()
            and site["router"] in range(len(routers))
            for site in description["sites"]
        )
    )
