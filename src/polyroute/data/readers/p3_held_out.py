"""The held-out tasks of T0: few-shot files, evaluation splits and prompt templates."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from polyroute.data.readers.p3_settings import P3Settings
from polyroute.data.readers.prompt_templates import PromptTemplate, read_templates
from polyroute.data.readers.task_table import TaskSource, file_key, load, load_files, rows_key
from polyroute.data.records import checked, read_objects
from polyroute.data.suite import TaskInfo
from polyroute.errors import InputError
from polyroute.host.paths import check_link

__all__ = ["HeldOut", "held_out_source", "held_out_there"]


@dataclass(frozen=True)
class HeldOut:
    """Where the held-out tasks come from."""

    few_shot: Path | None
    templates: Path | None
    raw: Path | None
    chosen: P3Settings
    cache_dir: str | Path | None


def held_out_there(task: str, source: HeldOut) -> bool:
    """Whether the files that a held-out task needs are there."""
    if source.chosen.resample:
        return source.templates is not None and source.templates.is_dir()
    return source.few_shot is not None and (source.few_shot / task).is_dir()


def held_out_source(task: str, entry: Mapping[str, Any], source: HeldOut) -> TaskSource:
    """The records of one held-out task.

    Args:
        task: the name of the task.
        entry: its entry in `p3.yaml`.
        source: where its examples and templates come from.
    """
    dataset, subset = entry["data"].split("/")

    @cache
    def rows(split: str) -> datasets.Dataset:
        return _rows(dataset, subset, split, source)

    def shots() -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not source.chosen.resample:
            return _few_shot(_few_shot_file(task, entry["shots"], source), entry["shots"])
        drawn = list(range(len(rows(entry["train"]))))
        # T-Few shuffles the training split with NumPy's global generator.
        np.random.RandomState(source.chosen.seed).shuffle(drawn)
        chosen = drawn[: entry["shots"]]
        return ((f"{entry['data']}, row {i}", rows(entry["train"])[i]) for i in chosen)

    def raw() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        for where, row in shots():
            yield "train", where, row
        for number, row in enumerate(rows(entry["test"])):
            yield "test", f"{entry['data']}, {entry['test']}, row {number}", row

    def records() -> Iterator[Mapping[str, Any]]:
        templates = _templates(dataset, subset, entry, source)
        return checked(_shown(task, entry, raw(), templates, source), task, task)

    def key() -> list[Any]:
        drawn = (
            rows_key(rows(entry["train"]))
            if source.chosen.resample
            else file_key(_few_shot_file(task, entry["shots"], source))
        )
        shown = [
            [t.name, t.jinja, t.answer_choices] for t in _templates(dataset, subset, entry, source)
        ]
        return [
            task, dict(entry), source.chosen.seed, source.chosen.all_templates, shown, drawn,
            rows_key(rows(entry["test"])),
        ]  # fmt: skip

    info = TaskInfo(entry["category"], "accuracy", "held-out", True)
    return TaskSource(entry["data"], records, key, info)


def _few_shot_file(task: str, shots: int, source: HeldOut) -> Path:
    folder = (source.few_shot or Path()) / task
    path = folder / f"{shots}_shot" / f"{source.chosen.seed}_seed.jsonl"
    if not path.is_file():
        there = sorted(f"{p.parent.name}/{p.name}" for p in folder.glob("*_shot/*_seed.jsonl"))
        raise InputError(
            f"there is no {path}; open the suite with a seed and shots that have a file "
            f"({', '.join(there) or 'there is none'}), or with resample=True"
        )
    check_link(path)
    return path


def _few_shot(path: Path, shots: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    count = 0
    for where, row in read_objects(path):
        count += 1
        yield where, row
    if count != shots:
        raise InputError(f"{path} has {count} examples and should have {shots}; restore the file")


def _rows(dataset: str, subset: str, split: str, source: HeldOut) -> datasets.Dataset:
    """A split of the data set itself, from the folder `raw` or else from the hub."""
    place = (source.raw or Path()) / dataset / subset
    if source.raw is not None and place.is_dir():
        rows = load_files(place, split, source.cache_dir)
        if rows is None:
            raise InputError(f"{place} has no {split}.jsonl or {split}.parquet; add it")
        return rows
    cached = None if source.cache_dir is None else str(source.cache_dir)
    name = None if subset == "None" else subset
    return load(f"{dataset}/{subset}", dataset, name, split=split, cache_dir=cached)


def _templates(
    dataset: str, subset: str, entry: Mapping[str, Any], source: HeldOut
) -> list[PromptTemplate]:
    """The templates that ask for what the data set is about."""
    folder = source.templates or Path("templates")
    every = read_templates(folder, dataset, None if subset == "None" else subset)
    own = [template for template in every if template.original_task]
    if not own:
        raise InputError(
            f"no template of {entry['data']} in {folder} is marked as original_task; it shows "
            "nothing to answer"
        )
    return own[: entry.get("templates")]


def _shown(
    task: str,
    entry: Mapping[str, Any],
    raw: Iterator[tuple[str, str, Mapping[str, Any]]],
    templates: list[PromptTemplate],
    source: HeldOut,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each example in one template, which the seed draws, or in every template."""
    for number, (split, where, row) in enumerate(raw):
        rng = random.Random(f"{source.chosen.seed} {number} {task}")
        for template in templates if source.chosen.all_templates else [rng.choice(templates)]:
            choices = template.choices(row)
            try:
                place = int(row[entry["label"]]) - entry["first"]
                target = (choices or [])[place] if place >= 0 else None
            except (KeyError, TypeError, ValueError, IndexError):
                target = None
            if choices is None or target is None:
                raise InputError(
                    f"{where}: the column {entry['label']!r} is {row.get(entry['label'])!r}, which "
                    f"is not the place of an answer of the template {template.name!r}"
                )
            yield (
                f"{where}, template {template.name!r}",
                {
                    "instruction": "",
                    "input": template.prompt(row),
                    "target": target,
                    "choices": list(dict.fromkeys(choices)),
                    "split": split,
                },
            )
