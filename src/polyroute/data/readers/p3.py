"""T0: its training mixture from P3, one task per prompt template, and its held-out few-shot tasks.

The mixture is `bigscience/P3` on the hub, a folder with a copy of it, or a folder of rows with the
same columns. The folders `few_shot` of T-Few and `templates` of promptsource add the held-out
tasks:

    <template>/train-*.parquet               or <template>.jsonl; such as glue_mrpc_equivalent
    few_shot/<task>/<n>_shot/<seed>_seed.jsonl
    templates/<dataset>/<subset>/templates.yaml
    raw/<dataset>/<subset>/<split>.jsonl     optional; otherwise loaded from the hub

`p3.yaml` in the package lists the training and the held-out data sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import yaml

from polyroute.data.readers.p3_held_out import HeldOut, held_out_source, held_out_there
from polyroute.data.readers.p3_settings import P3Settings
from polyroute.data.readers.p3_training import P3, PROMPTS, Template, training_source
from polyroute.data.readers.task_table import TableSuite
from polyroute.data.records import cannot_read
from polyroute.data.suite import quiet_datasets
from polyroute.errors import InputError, reason
from polyroute.host.paths import check_link, expanded

__all__ = ["P3Suite", "is_p3"]

_OTHERS = ("few_shot", "templates", "raw")


class P3Suite(TableSuite):
    """The T0 protocol: prompt templates to train on, and the 11 held-out tasks.

    A training task is named `dataset/subset/template`; `None` stands for a missing subset. Its rows
    are free text. A held-out task has the few-shot examples of one seed in `train` and the
    published evaluation split in `test`.

    Args:
        source: `bigscience/P3`, or a folder; `~` is expanded.
        settings: the choices that the protocol leaves open; None for the published ones.
        cache_dir: where the tables are cached; None for the usual cache of `datasets`.

    Raises:
        InputError: no template of a training data set and no held-out task is found, or the hub
            cannot be reached.
    """

    def __init__(
        self,
        source: str | Path = P3,
        settings: P3Settings | None = None,
        *,
        cache_dir: str | Path | None = None,
    ) -> None:
        folder = None if str(source) == P3 else expanded(source).resolve()
        settings = settings or P3Settings()
        sources = {
            task: training_source(task, templates, cache_dir)
            for task, templates in _training_tasks(folder, settings).items()
        }
        held_out = _held_out(folder, settings, cache_dir)
        for task, entry in _table().held_out.items():
            if held_out_there(task, held_out):
                shots = (settings.shots or {}).get(task, entry["shots"])
                sources[task] = held_out_source(task, {**entry, "shots": shots}, held_out)
        if not sources:
            raise InputError(
                f"{source} has no prompt template of a training data set of T0, such as "
                "glue_mrpc_equivalent, and no few-shot files"
            )
        super().__init__("P3" if folder is None else folder.name, sources, cache_dir)


def _training_tasks(folder: Path | None, settings: P3Settings) -> dict[str, list[Template]]:
    """The templates of each training task."""
    places = _local(folder) if folder else _of_hub()
    table = _table()
    tasks: dict[str, list[Template]] = {}
    for group, names in _grouped(places, table).items():
        size, category = table.sizes[group]
        most = min(size, table.cap // len(names))
        for name in names:
            if name not in table.left_out:
                rest = name[len(_prefix(group)) :]
                task = group if settings.tasks == "dataset" else f"{group}/{rest}"
                template = Template(name, places[name], category, most, settings)
                tasks.setdefault(task, []).append(template)
    return tasks


def _held_out(folder: Path | None, settings: P3Settings, cache_dir: str | Path | None) -> HeldOut:
    few_shot, templates, raw = (
        expanded(given) if given else folder / name if folder else None
        for name, given in (
            ("few_shot", settings.few_shot),
            ("templates", settings.templates),
            ("raw", settings.raw),
        )
    )
    return HeldOut(few_shot, templates, raw, settings, cache_dir)


def is_p3(folder: Path) -> bool:
    """Whether a folder holds few-shot files, or prompt templates with the names of P3."""
    if (folder / "few_shot").is_dir():
        return True
    places = _local(folder)
    names = chain.from_iterable(_grouped(places, _table()).values())
    return any(_holds_prompts(places[name]) for name in names)


def _holds_prompts(place: Path | None) -> bool:
    """Whether a place with the name of a template is one: a folder, or rows of prompts."""
    if place is None or place.is_dir():
        return place is not None
    for path in (place.parent / f"{place.name}{ending}" for ending in (".jsonl", ".json")):
        if path.is_file():
            with path.open("rb") as file:
                return PROMPTS[0].encode() in file.read(1 << 16)
    return False


@dataclass(frozen=True)
class _Table:
    """The content of `p3.yaml`."""

    cap: int
    left_out: Sequence[str]
    sizes: Mapping[str, tuple[int, str]]
    """By `dataset/subset`: the number of its training rows, and its category."""
    held_out: Mapping[str, Mapping[str, Any]]


@cache
def _table() -> _Table:
    content = yaml.safe_load(
        (files("polyroute.data.readers") / "p3.yaml").read_text(encoding="utf-8")
    )
    sizes = {
        group: (size, category)
        for category, groups in content["train"].items()
        for group, size in groups.items()
    }
    return _Table(content["cap"], content["left_out"], sizes, content["held_out"])


def _prefix(group: str) -> str:
    """The prefix that the names of all templates of a data set share."""
    dataset, subset = group.split("/")
    return f"{dataset}_" if subset == "None" else f"{dataset}_{subset}_"


def _grouped(places: Mapping[str, Path | None], table: _Table) -> dict[str, list[str]]:
    """The templates of each training data set.

    They include the templates that are left out, because the published cap counts those too.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(places):
        group = next((g for g in table.sizes if name.startswith(_prefix(g))), None)
        if group is not None and not name.endswith("_score_eval"):
            found.setdefault(group, []).append(name)
    return found


def _local(folder: Path) -> dict[str, Path | None]:
    """Every folder and file of rows, by the name of a template."""
    base = folder / "data" if (folder / "data").is_dir() else folder
    try:
        entries = sorted(base.iterdir())
    except OSError as error:
        raise cannot_read(base, error) from error
    for entry in entries:
        check_link(entry)
    return {
        entry.name if entry.is_dir() else entry.stem: entry if entry.is_dir() else base / entry.stem
        for entry in entries
        if (entry.is_dir() and entry.name not in _OTHERS)
        or entry.suffix in (".parquet", ".jsonl", ".json")
    }


def _of_hub() -> dict[str, Path | None]:
    try:
        with quiet_datasets():
            return dict.fromkeys(datasets.get_dataset_config_names(P3))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the templates of {P3} cannot be listed ({reason(error)}); check that the hub can be "
            "reached, or give a folder with a copy"
        ) from error
