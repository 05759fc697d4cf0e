"""The folder of a run: what was asked for, with which versions, and what came out."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from polyroute.errors import InputError
from polyroute.files import make_folder, read_json, write_json

__all__ = ["machine", "open_run", "read_run", "record"]

DESCRIPTION = "run.json"
PACKAGES = ("polyroute", "torch", "transformers", "accelerate", "datasets", "numpy", "peft")


def open_run(folder: str | os.PathLike[str], *, resume: bool, overwrite: bool) -> Path:
    """Make the folder of a run, or take it up again.

    Args:
        folder: where; made if missing.
        resume: continue the run that is there.
        overwrite: delete what is there, if it is a run.

    Raises:
        InputError: the folder holds something and neither flag says what to do, or both do, or it
            is not a run's folder.
    """
    path = Path(folder)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    is_run = (path / DESCRIPTION).is_file()
    if path.is_dir() and any(path.iterdir()):
        if not is_run:
            raise InputError(f"{path} is not empty and holds no run; name another --out folder")
        if not resume and not overwrite:
            raise InputError(
                f"{path} holds a run already; --resume continues it, --overwrite replaces it"
            )
        if overwrite:
            shutil.rmtree(path)
    elif resume and not path.exists():
        raise InputError(f"{path} does not exist, so there is no run to resume")
    return make_folder(path)


def record(folder: Path, command: str, config: Mapping[str, Any]) -> None:
    """Write what was asked for, so that the folder explains itself.

    A resumed run must have been asked for the same.

    Raises:
        InputError: the run there was started with other settings.
    """
    path = folder / DESCRIPTION
    kept = {k: v for k, v in config.items() if k not in ("resume", "overwrite", "config", "out")}
    if path.exists():
        before = read_json(path)["config"]
        changed = sorted(k for k in kept if before.get(k) != kept[k])
        if changed:
            raise InputError(
                f"the run in {folder} was started with {changed[0]}={before.get(changed[0])!r}, "
                f"not {kept[changed[0]]!r}; resume it with the same settings"
            )
        return
    write_json(
        path,
        {
            "command": command,
            "argv": sys.argv[1:],
            "config": kept,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": machine(),
        },
    )


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of a run.

    Raises:
        InputError: the folder is not a run's.
    """
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        raise InputError(f"{path} is not a run: there is no {DESCRIPTION} in it")
    description = read_json(path / DESCRIPTION)
    if not isinstance(description, dict) or "config" not in description:
        raise InputError(f"{path / DESCRIPTION} is damaged: it has no config")
    return description


def machine() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
