"""`polyroute check`: whether the files of a run are whole."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.errors import InputError
from polyroute.host.files import read_json, read_tensors
from polyroute.host.output import Result
from polyroute.host.paths import expanded
from polyroute.host.progress import progress
from polyroute.program.commands.checkpoints import TRAINER_STATE, damage_of
from polyroute.program.options.finished import CheckOptions
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.hub import DESCRIPTION, SKILLS
from polyroute.saved.manifest import MANIFEST
from polyroute.saved.peft_export import CONFIG, TENSORS
from polyroute.saved.runs import DESCRIPTION as RUN

__all__ = ["check_run"]

TRAINED = ("train", "import")
"""Commands whose finished runs hold an inventory."""
TEXTS = ("metrics.json", "results.json", "alignment.json", "evaluate*.json", "compare.json")
"""What commands write beside it."""


def check_run(options: CheckOptions) -> Result:
    """Read every file of a run, and compare it with its digest where it has one.

    Raises:
        InputError: there is no such folder, nothing of polyroute is in it, or a file is missing or
            damaged; the message names the first, and says how many there are.
    """
    place = expanded(options.run)
    if not place.is_dir():
        raise InputError(f"{place} is not a folder")
    found = list(_parts(place))
    if not found:
        raise InputError(f"{place} holds no run, no inventory and no adapter")
    damages = [
        damage
        for path, kind in progress(found, "checking")
        if (damage := _damage(path, kind)) is not None
    ]
    if damages:
        several = f", and {len(damages) - 1} more" if len(damages) > 1 else ""
        raise InputError(f"{damages[0]}{several}")
    table = Table("checked", "what")
    for path, kind in found:
        table.add_row(escape(str(path.relative_to(place))), kind)
    return Result(
        {"run": str(place), "checked": [str(path.relative_to(place)) for path, _ in found]},
        (table, f"{len(found)} parts are whole"),
    )


def _parts(place: Path) -> Iterator[tuple[Path, str]]:
    """What there is to check: a path, and what it is."""
    for path in sorted([place, *(each for each in place.rglob("*") if each.is_dir())]):
        names = {each.name for each in path.iterdir() if each.is_file() or each.is_symlink()}
        if RUN in names:
            yield path, "run"
        if {TRAINER_STATE, MANIFEST} & names:
            yield path, "checkpoint"
        elif {DESCRIPTION, SKILLS} & names:
            yield path, "inventory"
        if CONFIG in names:
            yield path, "adapter, which has no digest"


def _damage(path: Path, kind: str) -> str | None:
    """What is wrong with a part, if anything."""
    if kind == "checkpoint":
        return damage_of(path)
    try:
        if kind == "run":
            _check_run(path)
        elif kind == "inventory":
            read_checkpoint(path).check_rows()
        else:
            fields = read_json(path / CONFIG)
            if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
                raise InputError(f"{path / CONFIG} is damaged: it does not say what the adapter is")
            read_tensors(path / TENSORS)
    except InputError as error:
        return str(error)
    return None


def _check_run(folder: Path) -> None:
    run: Any = read_json(folder / RUN)
    for pattern in TEXTS:
        for path in sorted(folder.glob(pattern)):
            read_json(path)
    if not isinstance(run, Mapping) or not isinstance(run.get("command"), str):
        raise InputError(f"{folder / RUN} is damaged: it has no command")
    command = run["command"]
    is_finished = command == "import" or (folder / "metrics.json").is_file()
    if command in TRAINED and is_finished and not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder / DESCRIPTION} is missing, though the run is finished")
