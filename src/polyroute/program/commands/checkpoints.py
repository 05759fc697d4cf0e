"""Checkpoints of the trainer in the folder of a run: which is the newest that is whole."""

import zipfile
from pathlib import Path

from polyroute.errors import InputError, fault_of
from polyroute.host.files import read_json
from polyroute.host.output import say
from polyroute.host.paths import check_link, check_readable
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.digests import SHA256
from polyroute.saved.hub import DESCRIPTION
from polyroute.saved.manifest import MANIFEST, check_manifest

__all__ = ["TRAINER_STATE", "check_checkpoint", "last_checkpoint"]

TRAINER_STATE = "trainer_state.json"
TORCH_FILES = ("optimizer.pt", "scheduler.pt")
RANDOM, RANDOM_OF_SEVERAL = "rng_state.pth", "rng_state_*.pth"
"""Files with the state of the random numbers: with one process, and with several."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None before the first.

    Raises:
        InputError: every checkpoint is damaged.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    damages: list[str] = []
    for path in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        if not (path / TRAINER_STATE).is_file():
            continue  # it is written last: the run was interrupted while it wrote the checkpoint
        if _lacks_manifest(path):  # which is written after it
            say(f"{path} has no {MANIFEST}, so it may not be whole; it is passed over")
            continue
        damage = fault_of(check_checkpoint, path)
        if damage is None:
            for sentence in damages:
                say(f"{sentence}; resuming from {path.name}")
            return path
        damages.append(damage)
    if damages:
        raise InputError(f"{damages[0]}; delete that checkpoint to start from the beginning")
    return None


def _lacks_manifest(checkpoint: Path) -> bool:
    """Whether there is none, though the version that wrote the checkpoint writes one."""
    path = checkpoint / DESCRIPTION
    if (checkpoint / MANIFEST).is_file() or not path.is_file():
        return False
    try:
        description = read_json(path)
    except InputError:
        return False  # which is a damage of its own
    return isinstance(description, dict) and SHA256 in description


def check_checkpoint(checkpoint: Path) -> None:
    """Make sure that training can go on from a checkpoint of the trainer.

    Raises:
        InputError: a file is missing or damaged, or no file of its own.
    """
    for path in (checkpoint, *sorted(checkpoint.iterdir())):
        check_link(path)  # the trainer follows links
    random = sorted(checkpoint.glob(RANDOM_OF_SEVERAL)) or [checkpoint / RANDOM]
    for path in (*(checkpoint / name for name in TORCH_FILES), *random):
        if not path.exists():
            raise InputError(f"{path} is missing")
        check_readable(path)
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} is damaged")
    if _lacks_manifest(checkpoint):
        raise InputError(f"{checkpoint / MANIFEST} is missing")
    path = checkpoint / TRAINER_STATE
    check_manifest(checkpoint)
    state = read_json(path)
    read_checkpoint(checkpoint).check_rows()
    if not (
        isinstance(state, dict)
        and isinstance(state.get("global_step"), int)
        and isinstance(state.get("log_history"), list)
    ):
        raise InputError(f"{path} is damaged")
