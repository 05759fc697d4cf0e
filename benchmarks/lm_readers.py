"""A suite of readers who want other things of the same texts, for `lm_studies.py`.

A reader is a task. Texts are the requests of data sets with topics, and a reader is interested in
half of the topics, drawn at random. Is a request for this reader: yes or no? The prompt has the
request alone, so nothing but the reader tells which answer is right. Or it names the reader, too,
which is the other way to tell a model. The texts and topics are real, the interests are drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from polyroute.data.suite import Suite, TaskInfo

__all__ = ["Readers"]

TOPICS = {"clinc_domain": 39, "sgd_system_act": 20, "snips_intent": 19}
"""Data sets, and how many readers each has."""
SEED = 0


@dataclass(frozen=True)
class Readers:
    """Readers of a suite's texts; see `polyroute.data.suite.Suite`."""

    suite: Suite
    are_named: bool = False
    """Whether prompts name the reader."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{'named ' if self.are_named else ''}readers of {self.suite.name}"

    @cached_property
    def interests(self) -> dict[str, tuple[str, frozenset[str]]]:
        """By reader, a data set and the topics that interest the reader; no two are alike."""
        rng = np.random.Generator(np.random.PCG64(SEED))
        found: dict[str, tuple[str, frozenset[str]]] = {}
        for source, count in TOPICS.items():
            topics = self.suite.split(source, "train")[0]["choices"]
            known: set[frozenset[str]] = set()
            while len(known) < count:
                chosen = frozenset(rng.choice(topics, size=len(topics) // 2, replace=False))
                if chosen not in known:
                    found[f"{source} reader {len(known):02d}"] = source, chosen
                    known.add(chosen)
        return found

    @property
    def tasks(self) -> tuple[str, ...]:
        """The readers, sorted."""
        return tuple(sorted(self.interests))

    def part(self, remainder: int) -> list[str]:
        """The readers whose number leaves one of the remainders 0 to 4 when divided by 5."""
        return [task for task in self.tasks if int(task[-2:]) % 5 == remainder]

    def info(self, task: str) -> TaskInfo:
        """Yes or no, chosen by an interest."""
        return TaskInfo(f"readers of {self.interests[task][0]}", "accuracy", None, True)

    def splits(self, task: str) -> tuple[str, ...]:
        """The splits of the data set."""
        return self.suite.splits(self.interests[task][0])

    def split(self, task: str, split: str) -> datasets.Dataset:
        """The texts of the data set, with the answers of a reader."""
        source, chosen = self.interests[task]
        rows = self.suite.split(source, split)

        def answered(row: Mapping[str, Any]) -> dict[str, Any]:
            answer = "yes" if row["target"] in chosen else "no"
            asked = f"Is this for {task}?" if self.are_named else ""
            return {"task": task, "instruction": asked, "target": answer, "choices": ["yes", "no"]}

        return rows.map(answered, features=rows.features)
