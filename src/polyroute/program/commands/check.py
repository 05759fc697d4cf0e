"""`polyroute check`: whether the files of a run are whole."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from polyroute.errors import InputError
from polyroute.host.files import read_json, read_tensors
from polyroute.host.output import Result
from polyroute.host.progress import progress
from polyroute.program.options.finished import CheckOptions
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.digests import MANIFEST, check_manifest
from polyroute.saved.hub import DESCRIPTION
from polyroute.saved.peft_export import CONFIG, TENSORS

__all__ = ["check_run"]

JSON = ("run.json", "metrics.json", "results.json", "evaluate*.json")


def check_run(options: CheckOptions) -> Result:
    """Read every file of a run, and compare it with its digest where it has one.

    Raises:
        InputError: there is no such folder, nothing of polyroute is in it, or a file is damaged;
            the message names the first, and how many there are.
    """
    place = Path(options.run).expanduser()
    if not place.is_dir():
        raise InputError(f"{place} is not a folder")
    found = _parts(place)
    if not found:
        raise InputError(f"{place} holds no run, no inventory and no adapter")
    damages: dict[Path, str] = {}
    for path, kind in progress(list(found.items()), "checking"):
        try:
            CHECKS[kind](path)
        except InputError as error:
            damages[path] = str(error)
    if damages:
        several = f", and {len(damages) - 1} more" if len(damages) > 1 else ""
        raise InputError(f"{next(iter(damages.values()))}{several}")
    table = Table("checked", "what")
    for path, kind in found.items():
        table.add_row(escape(str(path.relative_to(place))), kind)
    return Result(
        {"run": str(place), "checked": [str(path.relative_to(place)) for path in found]},
        (table, f"{len(found)} parts are whole"),
    )


def _parts(place: Path) -> dict[Path, str]:
    """What there is to check, by path."""
    found: dict[Path, str] = {}
    for pattern in JSON:
        found |= dict.fromkeys(sorted(place.rglob(pattern)), "text")
    for name, kind in ((DESCRIPTION, "inventory"), (MANIFEST, "checkpoint"), (CONFIG, "adapter")):
        found |= {path.parent: kind for path in sorted(place.rglob(name)) if path.is_file()}
    return found


def _check_inventory(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    if checkpoint.saved_routes is not None:
        checkpoint.saved_routes.check(checkpoint.tasks)


def _check_checkpoint(folder: Path) -> None:
    check_manifest(folder)
    _check_inventory(folder)


def _check_adapter(folder: Path) -> None:
    read_json(folder / CONFIG)
    read_tensors(folder / TENSORS)


CHECKS = {
    "text": read_json,
    "inventory": _check_inventory,
    "checkpoint": _check_checkpoint,
    "adapter": _check_adapter,
}
