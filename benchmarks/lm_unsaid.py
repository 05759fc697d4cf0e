"""A suite whose prompts do not say what the task is, for `lm_studies.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from polyroute.data.suite import Suite, TaskInfo

__all__ = ["Unsaid"]


@dataclass(frozen=True)
class Unsaid:
    """A suite without its instructions; see `polyroute.data.suite.Suite`."""

    suite: Suite

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.suite.name} without instructions"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, sorted."""
        return self.suite.tasks

    def info(self, task: str) -> TaskInfo:
        """What the suite says about a task."""
        return self.suite.info(task)

    def splits(self, task: str) -> tuple[str, ...]:
        """The splits that a task has."""
        return self.suite.splits(task)

    def split(self, task: str, split: str) -> datasets.Dataset:
        """The examples of one split of a task, with empty instructions."""
        rows = self.suite.split(task, split)
        return rows.map(_without_instruction, features=rows.features)


def _without_instruction(_: Mapping[str, Any]) -> dict[str, str]:
    return {"instruction": ""}
