"""The files of a saved inventory: JSON for what it is, safetensors for the numbers.

    polyroute.json           format, config, tasks, sites, routers
    inventory.safetensors    <site>.lora_a [H, K, d_in/H, r], <site>.lora_b [H, K, r, d_out/H]
    routes.safetensors       rows [T, N * H * K]

The factors are in the layout of the published checkpoints, one tensor per layer, so that other
programs can read them. Nothing here is ever unpickled.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyroute.errors import InputError

__all__ = [
    "Checkpoint",
    "make_folder",
    "read_checkpoint",
    "read_json",
    "read_tensors",
    "write_checkpoint",
    "write_json",
    "write_tensors",
]

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


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Create the folder and its parents.

    Raises:
        InputError: a file is in the way, or the place cannot be written.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder to write to")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write to the folder {path}; check its permissions")
    return path


def write_json(path: Path, value: object) -> None:
    """Write readable JSON, whole or not at all."""
    _replace(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    contiguous = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    temporary = _temporary_beside(path)
    try:
        save_file(contiguous, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        InputError: the file is missing, truncated or of another kind.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = _temporary_beside(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary_beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    Path(name).chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
    return Path(name)
