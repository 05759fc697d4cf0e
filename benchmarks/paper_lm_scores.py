"""What the tables of `paper_lm.py` have in common: titles, scores, what they are compared with."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_tables import Result, by_task, difference, interval, results_of

__all__ = [
    "AS_THEY_ARE",
    "BASE",
    "CONTENDER_TITLES",
    "REFERENCE",
    "REFERENCES",
    "WAYS",
    "cells",
    "of_seeds",
    "per_token",
    "reference",
    "score",
    "stage",
]

BASE = "the base model as it is"
WAYS = {
    "zero-shot": "zero-shot",
    "continued": "zero-shot, after more training of the average",
    "text": "routes by texts, as they are",
    "usage": "the mean of all tasks' routes, as it is",
    "nearest-32": "the nearest routes by 32 examples, as they are",
    "mu": "mu",
    "mu-nearest": "mu from the nearest routes",
    "mu-usage": "mu from the mean of all tasks' routes",
    "z": "z",
    "full": "full",
    "random": "a fresh LoRA instead",
}
"""How inventories are used, by what the names of their stages hold."""
AS_THEY_ARE = ("zero-shot", "continued", "text", "usage", "nearest-32")
"""Ways whose stages have one number of examples, or none."""
COMPARED_WITH = {
    **dict.fromkeys(("continued", "text", "usage"), "zero-shot"),
    **dict.fromkeys(("nearest-32", "mu-nearest", "mu-usage", "z", "full", "random"), "mu"),
}
"""How a shared LoRA is used that a way is compared with; others are compared with themselves."""
REFERENCE = "shared"
REFERENCES = (REFERENCE, "shared-matched")
"""What the contenders of the main runs are compared with."""
CONTENDER_TITLES = {
    "shared": "one shared LoRA",
    "shared-matched": "one shared LoRA of rank 32",
    "poly": "Poly",
    "mhr": "MHR",
    "grouped": "MHR, a skill for each group of tasks",
    "grouped-32": "MHR, 32 skills of rank 1 for smaller groups",
    "common": "a skill for each task beside a common one",
    "private": "a LoRA for each task, or their mean",
}
"""The rows of the tables of the main runs."""
SEEDS = range(9)
"""Of training; those that ran are found by their files."""


def reference(shared: Mapping[str, Sequence[Result]], way: str) -> Sequence[Result]:
    """Of the results of a shared LoRA by way, those that a way is compared with."""
    return shared.get(COMPARED_WITH.get(way, way), [])


def cells(results: Sequence[Result], references: Iterable[Sequence[Result]]) -> list[str]:
    """Both scores, and the differences per token to references; empty to itself and to nothing."""
    own = per_token(results)
    gaps = [
        "" if results == other or not other else difference(own, per_token(other)).signed
        for other in references
    ]
    return [score(results), score(own), *gaps]


def per_token(results: Iterable[Result]) -> list[Result]:
    """Results whose score is the one per token."""
    return [{**result, "score": result["score_normalised"]} for result in results]


def score(results: Iterable[Result]) -> str:
    """The mean over tasks, and its interval."""
    return str(interval(list(by_task(results).values())))


def stage(role: str, way: str, shots: int = 32) -> str:
    """How the names of a way's files begin, such as `test-mu-32`."""
    return f"{role}-{way}" if way in AS_THEY_ARE else f"{role}-{way}-{shots}"


def of_seeds(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The results of every seed of training, each with that seed."""
    return [
        {**result, "seed": seed}
        for seed in SEEDS
        for result in results_of(folder, [f"{stage}-s{seed}"])
    ]
