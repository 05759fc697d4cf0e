"""The training tasks of T0: rows of P3's prompt templates, capped, and split by a seed."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from polyroute.data.readers.p3_settings import P3Settings
from polyroute.data.readers.prompt_templates import NO_INPUT, NO_LABEL
from polyroute.data.readers.task_table import TaskSource, load, load_files, rows_key
from polyroute.data.records import checked
from polyroute.data.suite import Metric, TaskInfo
from polyroute.errors import InputError

__all__ = ["P3", "PROMPTS", "Template", "training_source"]

P3 = "bigscience/P3"
"""The id of the data set on the hub."""

PROMPTS = ("inputs_pretokenized", "source", "input")
"""The names that the column of prompts may have."""

_ANSWERS = ("targets_pretokenized", "target", "output")
_WRITTEN = ("structure to text", "summarisation")
"""The categories whose answers are whole texts."""


@dataclass(frozen=True)
class Template:
    """The rows of one prompt template, and which of them are used."""

    name: str
    place: Path | None
    """Its folder, or its file without the ending; None for the hub."""
    category: str
    most: int
    """Only this many of its first rows are used."""
    settings: P3Settings

    def rows(self, cache_dir: str | Path | None) -> datasets.Dataset:
        """All training rows of the template.

        Raises:
            InputError: the rows cannot be loaded.
        """
        if self.place is None:
            cached = None if cache_dir is None else str(cache_dir)
            return load(self.name, P3, self.name, split="train", cache_dir=cached)
        rows = load_files(self.place, "train", cache_dir)
        if rows is None:
            raise InputError(f"{self.place} holds no training rows as .parquet, .jsonl or .json")
        return rows

    def split_up(self, num_rows: int) -> dict[str, list[int]]:
        """The indices of the rows of each split, in order.

        Raises:
            InputError: no row is left for training.
        """
        places = range(min(num_rows, self.most))
        validation, most = self.settings.validation, self.settings.per_template
        if len(places) <= validation:
            raise InputError(
                f"the template {self.name} has {len(places)} rows to use, and {validation} are for "
                "validation, so none is left for training; open the suite with a lower validation"
            )
        rng = random.Random(f"{self.settings.seed} {self.name}")
        held = sorted(rng.sample(places, validation))
        rest = sorted(set(places) - set(held))
        if most is not None and most < len(rest):
            rest = sorted(rng.sample(rest, most))
        return {"train": rest, "validation": held}

    def records(self, cache_dir: str | Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """The records, not yet checked, each with a description of where it comes from.

        Raises:
            InputError: the rows cannot be loaded or used.
        """
        rows = self.rows(cache_dir)
        prompt, answer = (_column(rows, names, self.name) for names in (PROMPTS, _ANSWERS))
        for split, places in self.split_up(len(rows)).items():
            chosen = rows.select(places).select_columns([prompt, answer])
            for place, row in zip(places, chosen, strict=True):
                # Published answers begin with a line break that is left over from the separator.
                text, target = ((row[name] or "").strip() for name in (prompt, answer))
                yield (
                    f"{self.name}, row {place}",
                    {
                        "instruction": "",
                        "input": text or NO_INPUT,
                        "target": target if text and target else NO_LABEL,
                        "choices": None,
                        "split": split,
                    },
                )


def _column(rows: datasets.Dataset, names: Sequence[str], template: str) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise InputError(
        f"the rows of the template {template} have no column {names[0]!r}, but "
        f"{', '.join(rows.column_names)}; rename the one that holds it"
    )


def training_source(
    task: str, parts: Sequence[Template], cache_dir: str | Path | None
) -> TaskSource:
    """The records of a training task: the rows of one template, or of several."""
    place = ", ".join(str(part.place or f"{P3}, {part.name}") for part in parts)
    category = parts[0].category
    metric: Metric = "rougeL" if category in _WRITTEN else "exact_match"

    def records() -> Iterator[Mapping[str, Any]]:
        return checked(chain.from_iterable(part.records(cache_dir) for part in parts), task, place)

    def key() -> list[Any]:
        return [
            [
                part.name,
                part.most,
                part.settings.seed,
                part.settings.validation,
                part.settings.per_template,
                rows_key(part.rows(cache_dir)),
            ]
            for part in parts
        ]

    return TaskSource(place, records, key, TaskInfo(category, metric, "train", False))
