"""The training tasks of T0: rows of P3's prompt templates, capped and split up by a seed."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from polyroute.data.readers.prompt_templates import NO_INPUT, NO_LABEL
from polyroute.data.readers.task_table import TaskSource, load, load_files, rows_key
from polyroute.data.records import checked
from polyroute.data.suite import Metric, TaskInfo
from polyroute.errors import InputError

__all__ = ["HUB", "PROMPTS", "Template", "training_source"]

HUB = "bigscience/P3"

PROMPTS = ("inputs_pretokenized", "source", "input")
"""What the column of prompts may be called."""

_ANSWERS = ("targets_pretokenized", "target", "output")
_WRITTEN = ("structure to text", "summarisation")
"""Categories whose answers are whole texts."""


@dataclass(frozen=True)
class Template:
    """The rows of one prompt template: which of them are used, and for what."""

    name: str
    place: Path | None
    """A folder or file of its own, without ending; None for the hub."""
    category: str
    most: int
    seed: int
    validation: int
    per_template: int | None

    def rows(self, cache_dir: str | Path | None) -> datasets.Dataset:
        """All of its training rows.

        Raises:
            InputError: they cannot be loaded.
        """
        if self.place is None:
            cached = None if cache_dir is None else str(cache_dir)
            return load(self.name, HUB, self.name, split="train", cache_dir=cached)
        rows = load_files(self.place, "train", cache_dir)
        if rows is None:
            raise InputError(f"{self.place} holds no training rows as .parquet, .jsonl or .json")
        return rows

    def split_up(self, num_rows: int) -> dict[str, list[int]]:
        """The rows of each split, as places in order.

        Raises:
            InputError: no row is left for training.
        """
        places = range(min(num_rows, self.most))
        if len(places) <= self.validation:
            raise InputError(
                f"the template {self.name} has {len(places)} rows to use, and {self.validation} "
                "are for validation: none is left; open the suite with a lower validation"
            )
        rng = random.Random(f"{self.seed} {self.name}")
        held = sorted(rng.sample(places, self.validation))
        rest = sorted(set(places) - set(held))
        if self.per_template is not None and self.per_template < len(rest):
            rest = sorted(rng.sample(rest, self.per_template))
        return {"train": rest, "validation": held}

    def records(self, cache_dir: str | Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Its records, not yet checked, each with the words that say where it is.

        Raises:
            InputError: the rows cannot be loaded or used.
        """
        rows = self.rows(cache_dir)
        prompt, answer = (_column(rows, names, self.name) for names in (PROMPTS, _ANSWERS))
        for split, places in self.split_up(len(rows)).items():
            chosen = rows.select(places).select_columns([prompt, answer])
            for place, row in zip(places, chosen, strict=True):
                # Published answers begin with a line break, left over from the separator.
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
    """Where a training task comes from: the rows of one template, or of several."""
    place = ", ".join(str(part.place or f"{HUB}, {part.name}") for part in parts)
    category = parts[0].category
    metric: Metric = "rougeL" if category in _WRITTEN else "exact_match"

    def records() -> Iterator[Mapping[str, Any]]:
        return checked(chain.from_iterable(part.records(cache_dir) for part in parts), task, place)

    def key() -> list[Any]:
        return [
            [p.name, p.most, p.seed, p.validation, p.per_template, rows_key(p.rows(cache_dir))]
            for p in parts
        ]

    return TaskSource(place, records, key, TaskInfo(category, metric, "train", False))
