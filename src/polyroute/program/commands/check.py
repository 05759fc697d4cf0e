"""`polyroute check`: whether the files of a run are whole."""

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.adapting.slot import read_slot
from polyroute.errors import InputError, fault_of
from polyroute.exchange.peft_folders import ADAPTERS, is_whole
from polyroute.host.files import read_json
from polyroute.host.output import Result
from polyroute.host.paths import check_link, expanded
from polyroute.host.progress import progress
from polyroute.program.commands.adapted import check_adapter, place_of, read_results
from polyroute.program.commands.checkpoints import TRAINER_STATE, check_checkpoint
from polyroute.program.options.finished import CheckOptions
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.hub import DESCRIPTION, SKILLS
from polyroute.saved.manifest import MANIFEST
from polyroute.saved.metrics import METRICS, read_metrics
from polyroute.saved.peft_export import CONFIG, TENSORS
from polyroute.saved.runs import DESCRIPTION as RUN
from polyroute.saved.runs import RUNNING, check_links, read_run

__all__ = ["check_run"]

TRAINED = ("train", "import")
"""Commands whose finished runs hold an inventory."""
RESULTS = "results.json"
TEXTS: Mapping[str, frozenset[str]] = {
    RESULTS: frozenset(),
    "alignment.json": frozenset(),
    "compare.json": frozenset(),
    "evaluate*.json": frozenset({"macro_average", "split", "tasks"}),
}
"""What commands write beside it, and entries that it has."""


def check_run(options: CheckOptions) -> Result:
    """Read every file of a run, and compare it with its digest where it has one.

    Raises:
        InputError: there is no such folder, nothing of polyroute is in it, or a file is missing or
            damaged; the message names the first, and says how many there are.
    """
    place = expanded(options.run)
    if not place.is_dir():
        raise InputError(f"{place} is not a folder")
    if place.is_symlink():  # the user named it; below it, links must not lead elsewhere
        place = place.resolve()
    found = list(_parts(place))
    if not found:
        raise InputError(f"{place} holds no run, no inventory and no adapter")
    damages = [
        damage
        for path, kind in progress(found, "checking")
        if (damage := fault_of(_check_part, path, kind, place)) is not None
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
        if {CONFIG, TENSORS} & names:
            yield path, "adapter" if MANIFEST in names else "adapter, which has no digest"
        elif {TRAINER_STATE, MANIFEST} & names:
            yield path, "checkpoint"
        elif {DESCRIPTION, SKILLS} & names:
            yield path, "inventory"
        elif path.name == RUNNING:
            yield path, "running slots"


def _check_part(path: Path, kind: str, place: Path) -> None:
    for each in (*([path] if path != place else []), *sorted(path.iterdir())):
        check_link(each)
    if kind == "checkpoint":
        check_checkpoint(path)
    elif kind == "run":
        _check_run(path)
    elif kind == "inventory":
        read_checkpoint(path).check_rows()
    elif kind == "running slots":
        for file in sorted(path.glob("*.safetensors")):
            read_slot(file)
        for file in sorted(path.glob("results-*.json")):
            read_results(file)
    else:
        check_adapter(path)


def _check_run(folder: Path) -> None:
    run = read_run(folder)
    check_links(folder)
    command = run["command"]
    is_finished = command == "import" or (folder / METRICS).exists()
    if command in TRAINED and is_finished and not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder / DESCRIPTION} is missing, though the run is finished")
    if (folder / METRICS).exists():
        read_metrics(folder)
    if command == "adapt":
        _check_adaptations(folder, run["config"])
    if command == "export":
        _check_export(folder)
    for pattern, entries in TEXTS.items():
        for path in sorted(folder.glob(pattern)):
            found = read_json(path)
            if command == "adapt" and path.name == RESULTS:
                continue
            if not isinstance(found, dict) or not found or entries - found.keys():
                raise InputError(f"{path} is damaged: it does not hold what polyroute writes there")


def _check_adaptations(folder: Path, config: Mapping[str, Any]) -> None:
    """Make sure that a run of `polyroute adapt` has its results, and each of them its adapter."""
    path, is_over = folder / RESULTS, not (folder / RUNNING).exists()
    if not path.exists():
        if is_over and any(folder.glob("*/seed-*")):
            raise InputError(f"{path} is missing, though the run is finished")
        return
    results = read_results(path)
    for result in results:
        place = place_of(folder, result)
        missing = [name for name in (CONFIG, TENSORS) if not (place / name).exists()]
        if result["score"] is not None and missing:
            raise InputError(f"{place / missing[0]} is missing, though results.json has its score")
    found = {(result["task"], result["seed"]) for result in results}
    lacking = [
        w for w in product(config.get("tasks", ()), config.get("seeds", ())) if w not in found
    ]
    if is_over and lacking:
        raise InputError(
            f"{path} is damaged: it has no result of {lacking[0][0]} with seed {lacking[0][1]}"
        )


def _check_export(folder: Path) -> None:
    """Make sure that an export of all tasks, if it is finished, has every adapter."""
    path = folder / ADAPTERS
    if not path.exists():
        return
    listed = read_json(path)
    is_list = isinstance(listed, list) and all(
        isinstance(one, dict) and isinstance(one.get("lora_path"), str) for one in listed
    )
    if not is_list:
        raise InputError(f"{path} is damaged: it does not list adapters; --resume writes it anew")
    for one in listed:
        place = folder / Path(one["lora_path"]).name  # the whole folder may have been moved
        if not is_whole(place):
            raise InputError(f"{place} holds no adapter, though the export has one; use --resume")
