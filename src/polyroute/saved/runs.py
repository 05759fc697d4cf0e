"""The folder of a run: its settings, the versions and hardware it used, and its results.

When one launch starts several processes, only the first checks, creates, describes and locks it.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from polyroute.errors import InputError
from polyroute.host.files import (
    UNFINISHED,
    check_place,
    make_folder,
    read_json,
    remove,
    remove_unfinished,
    write_new_json,
)
from polyroute.host.locks import is_still_there, locked
from polyroute.host.paths import check_link, expanded
from polyroute.host.processes import is_first
from polyroute.saved.base_names import is_packaged
from polyroute.saved.digests import SHA256, described_digest
from polyroute.saved.hub import DESCRIPTION as INVENTORY
from polyroute.saved.hub import MODULES, SHARDS, SKILLS

__all__ = [
    "BEFORE",
    "DESCRIPTION",
    "DIGEST",
    "EXAMPLES",
    "RUNNING",
    "check_links",
    "check_run",
    "digest",
    "held",
    "machine",
    "open_run",
    "read_run",
    "record",
]

BEFORE = {"dtype": "float32", "prompt": "plain", "system": None}
"""What runs of older versions did, whose `run.json` does not say so; not always the default."""
DESCRIPTION = "run.json"
DIGEST = "inventory_sha256"
"""Key in the config of a run that starts from an inventory: the inventory's `digest`."""
EXAMPLES = "examples_sha256"
"""Key in the config of a training: a hash of what it trains on. Older versions wrote none."""
PATHS = ("model", "data", "run", "start", "source")
RUNNING = ".running"
"""Folder of unfinished slots inside a run of `polyroute adapt`."""
NOT_KEPT = ("resume", "overwrite", "config", "out", "memory", "dry_run")
ENTRIES = {"command", "argv", "config", "started", "machine", "prompting", SHA256}
"""All that a description has had, of any version."""
PACKAGES = ("polyroute", "torch", "transformers", "accelerate", "datasets", "numpy", "peft")


def check_run(
    folder: str | os.PathLike[str],
    command: str | None = None,
    *,
    resume: bool,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Check that `open_run` would work, without changing anything.

    Args:
        folder: the folder of the run.
        command: the command that is to run there; None to accept a run of any command.
        resume: continue the run in the folder.
        overwrite: delete the run in the folder.
        inputs: files and folders that the command reads; those that do not exist are skipped.

    Raises:
        InputError: see `open_run`.
    """
    path = expanded(folder)
    if not is_first():
        return path
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    place = path.resolve()
    for source in map(Path, inputs):
        read = expanded(source).resolve()
        if read.exists() and (place == read or place in read.parents):
            raise InputError(
                f"--out {path} is or contains {source}, which the command reads; "
                "name another --out folder"
            )
    check_place(path)
    if path.is_dir() and _holds_anything(path):
        _check_former(path, command, resume=resume, overwrite=overwrite)
    elif resume:
        reason = "is empty" if path.exists() else "does not exist"
        raise InputError(f"{path} {reason}, so there is no run to resume")
    return path


def _holds_anything(path: Path) -> bool:
    """Whether a folder has more than what a start left that was killed before its run began."""
    return any(
        not (entry.name.endswith(UNFINISHED) or _is_empty_description(entry))
        for entry in path.iterdir()
    )


def _is_empty_description(path: Path) -> bool:
    """Older versions left one where they were killed while they wrote it."""
    return path.name == DESCRIPTION and path.is_file() and not path.stat().st_size


def _check_former(path: Path, command: str | None, *, resume: bool, overwrite: bool) -> None:
    if not (path / DESCRIPTION).is_file():
        raise InputError(f"{path} is not empty and holds no run; name another --out folder")
    former = read_run(path)["command"]
    if command is not None and former != command:
        raise InputError(
            f"{path} holds a run of `polyroute {former}`, not of `polyroute {command}`; "
            "name another --out folder"
        )
    if not resume and not overwrite:
        raise InputError(
            f"{path} holds a run already; --resume continues it, --overwrite replaces it"
        )
    if resume:
        check_links(path)
    with _lock(path):
        pass


def check_links(folder: Path) -> None:
    """Make sure that no link in the folder of a run leads out of it.

    What goes on there would be written elsewhere. Checkpoints of trainers are left out: a link in
    one is a damage of that one.

    Raises:
        InputError: a link does.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith("checkpoint-")]
        for name in (*folders, *files):
            if not name.startswith("checkpoint-"):
                check_link(Path(place, name))


def open_run(
    folder: str | os.PathLike[str],
    command: str | None = None,
    *,
    resume: bool,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Create the folder of a run, or open it again.

    Args:
        folder: the folder of the run; created if missing.
        command: the command that is to run there; None to accept a run of any command.
        resume: continue the run in the folder.
        overwrite: delete the run in the folder.
        inputs: files and folders that the command reads; they must not lie in `folder`.

    Raises:
        InputError: both flags are set; the folder is not empty and no flag is set; it holds no run,
            a run of another command, or one that another process works in; an input lies in it; or
            it is to be resumed, and a link in it leads out of it.
    """
    path = check_run(folder, command, resume=resume, overwrite=overwrite, inputs=inputs)
    if not is_first():
        return path
    if overwrite and path.is_dir():
        for entry in path.iterdir():  # the folder itself may be a link that the user named
            remove(entry)
    make_folder(path)
    if not resume and _is_empty_description(path / DESCRIPTION):
        (path / DESCRIPTION).unlink()
    return path


def record(
    folder: Path,
    command: str,
    config: Mapping[str, Any],
    *,
    resume: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the settings of a run into its folder, or compare them with those of a resumed run.

    Args:
        folder: the folder of the run, from `open_run`.
        command: the command that runs there.
        config: its settings; local folders are stored as absolute paths.
        resume: compare with the description in the folder instead of writing one.
        notes: what the description says besides, which is not compared.

    Raises:
        InputError: a resumed run was started with other settings, or another process has just
            started a run in the folder.
    """
    if not is_first():
        return
    path = folder / DESCRIPTION
    kept = _absolute({k: v for k, v in config.items() if k not in NOT_KEPT})
    if resume:
        before = _absolute(read_run(folder)["config"])
        changed = sorted(k for k in kept if before.get(k) != kept[k])
        if DIGEST in changed:
            raise InputError(
                f"the run in {folder} was started from another inventory, not from the one that is "
                f"now in {kept.get('run')}; start again in another --out folder"
            )
        if changed == [EXAMPLES]:
            raise InputError(
                f"the run in {folder} was started on other training examples than those that are "
                f"now in {kept.get('data')}; bring them back, or start again in another --out "
                "folder"
            )
        if changed:
            name = next(name for name in changed if name != EXAMPLES)  # it follows from others
            raise InputError(
                f"the run in {folder} was started with {name}={before.get(name)!r}, "
                f"not {kept[name]!r}; resume it with the same settings"
            )
        return
    description = {
        "command": command,
        "argv": sys.argv[1:],
        "config": kept,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
        **(notes or {}),
    }
    try:
        write_new_json(path, {**description, SHA256: described_digest(description)})
    except FileExistsError as error:
        raise InputError(
            f"{folder} holds a run already; --resume continues it, --overwrite replaces it"
        ) from error


@contextmanager
def held(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock the folder of a run, and clear it of what killed writers left.

    The system releases the lock when the process ends.

    Yields:
        A function that makes sure that the folder is still the one that it was; call it before
        more is written there.

    Raises:
        InputError: another process works there; or, at the end of the block or where that
            function is called, the folder is no longer the one that it was.
    """
    if not is_first():
        yield lambda: None
        return
    with _lock(folder) as (file, is_locked):

        def check() -> None:
            if not is_still_there(folder / DESCRIPTION, file):
                raise InputError(
                    f"the folder {folder} was removed or replaced while the run worked in it, so "
                    "what is there now is not whole: start again"
                )

        if is_locked:
            remove_unfinished(folder, own=DESCRIPTION)
        try:
            yield check
        except Exception:
            check()  # whatever could not be done, that is why
            raise
        check()


@contextmanager
def _lock(folder: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """The open description of a run, and whether it is locked."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(locked(folder / DESCRIPTION, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"another process works in {folder}; wait for it, or name another --out folder"
            ) from error
        yield found


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the description of a run: at least its `command` and its `config`.

    Raises:
        InputError: the folder holds no run, or the description is damaged.
    """
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        raise InputError(f"{path} is not a run: there is no {DESCRIPTION} in it")
    description = read_json(path / DESCRIPTION)
    if (
        not isinstance(description, dict)
        or not isinstance(description.get("config"), dict)
        or not isinstance(description.get("command"), str)
    ):
        raise InputError(f"{path / DESCRIPTION} is damaged: it has no command or no config")
    # Older versions wrote no digest; without one, an entry of another name may have been it.
    odd = [SHA256] if SHA256 in description else sorted(description.keys() - ENTRIES)
    if odd and description.get(SHA256) != described_digest(description):
        raise InputError(
            f"{path / DESCRIPTION} is damaged: it does not say what was written; bring back a "
            f"whole one or, if you changed it yourself, take out its entry {odd[0]!r}"
        )
    return description


def digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of the files of the inventory in a folder."""
    total = hashlib.sha256()
    shards = sorted(path.name for path in Path(folder).glob(SHARDS))
    for name in (INVENTORY, SKILLS, MODULES, *shards):
        path = Path(folder) / name
        if name == MODULES and not path.is_file():
            continue  # most inventories have none, and older ones never
        if path.is_file():
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        total.update(name.encode())
    return total.hexdigest()


def _absolute(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with local folders as absolute paths, so that it is valid in any directory."""
    result = dict(config)
    for key in PATHS:
        value = result.get(key)
        if isinstance(value, str) and not is_packaged(value):
            local = expanded(value)
            if local.exists():
                result[key] = os.path.abspath(local)  # noqa: PTH100 - resolve() follows links
    return result


def machine() -> dict[str, Any]:
    """The versions of packages and the hardware."""
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
