"""The generated demo suite: short text tasks composed of shared skills.

A task reads three words and writes one short string. Its answer is the composition of three
skills, one per stage: *select* a word, *transform* it, and *format* the result. Of the 72
compositions, 40 are training tasks, 12 are held out (they occur neither in training nor in the
pretraining of the base model), and the rest are only used for pretraining.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Skills = tuple[str, str, str]
Role = Literal["train", "held-out"]

SKILLS: dict[str, str] = {
    "first": "select",
    "last": "select",
    "longest": "select",
    "alphabetical": "select",
    "upper": "transform",
    "reverse": "transform",
    "initial": "transform",
    "length": "transform",
    "next": "transform",
    "lookup": "transform",
    "bracket": "format",
    "dash": "format",
    "star": "format",
}
"""Every skill with the stage it belongs to."""

CODES: dict[str, str] = {
    "first": "f",
    "last": "l",
    "longest": "g",
    "alphabetical": "a",
    "upper": "u",
    "reverse": "r",
    "initial": "i",
    "length": "n",
    "next": "x",
    "lookup": "k",
    "bracket": "b",
    "dash": "d",
    "star": "s",
}
"""The character that names each skill in the control codes the base model is pretrained on."""

_FRUITS: dict[str, str] = {
    "apple": "red",
    "banana": "yellow",
    "cherry": "red",
    "fig": "purple",
    "grape": "purple",
    "kiwi": "green",
    "lemon": "yellow",
    "lime": "green",
    "mango": "orange",
    "peach": "orange",
    "pear": "green",
    "plum": "purple",
}
_MONTHS: dict[str, str] = {
    "january": "winter",
    "february": "winter",
    "march": "spring",
    "april": "spring",
    "may": "spring",
    "june": "summer",
    "july": "summer",
    "august": "summer",
    "september": "autumn",
    "october": "autumn",
    "november": "autumn",
    "december": "winter",
}
_NUMBERS: dict[str, str] = {
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
}

# The domains, in order, each a look-up table; only months and number words have a successor.
_DOMAINS: tuple[dict[str, str], ...] = (_FRUITS, _MONTHS, _NUMBERS)
_ORDERED_DOMAINS: tuple[dict[str, str], ...] = (_MONTHS, _NUMBERS)

_LOOKUP: dict[str, str] = {word: value for table in _DOMAINS for word, value in table.items()}
_NEXT: dict[str, str] = {
    word: successor
    for table in _ORDERED_DOMAINS
    for word, successor in zip(table, [*list(table)[1:], next(iter(table))], strict=True)
}
_WORDS_PER_INPUT = 3

_PHRASES: dict[str, str] = {
    "first": "the first word",
    "last": "the last word",
    "longest": "the longest word",
    "alphabetical": "the A-Z first word",
    "upper": "Uppercase",
    "reverse": "Reverse",
    "initial": "Initial of",
    "length": "Length of",
    "next": "What follows",
    "lookup": "Look up",
    "bracket": "in brackets",
    "dash": "in dashes",
    "star": "in stars",
}
_CATEGORIES: dict[str, str] = {
    "upper": "strings",
    "reverse": "strings",
    "initial": "strings",
    "length": "numbers",
    "next": "dates",
    "lookup": "look-ups",
}

_TRAINING_TASKS = 40
_SPLIT_SEED = 2024


@dataclass(frozen=True)
class DemoTask:
    """One task of the suite.

    Attributes:
        name: The name of the task, its three skills joined by hyphens.
        skills: The skills to apply, one each to select, transform and format.
        instruction: The natural-language instruction of the task.
        role: Whether the task is trained on, or held out to test few-shot adaptation.
    """

    name: str
    skills: Skills
    instruction: str
    role: Role


def _select(words: Sequence[str], skill: str) -> str:
    match skill:
        case "first":
            return words[0]
        case "last":
            return words[-1]
        case "longest":
            return max(words, key=len)
        case "alphabetical":
            return min(words)
    raise ValueError(f"unknown select skill: {skill!r}")


def _transform(word: str, skill: str) -> str:
    match skill:
        case "upper":
            return word.upper()
        case "reverse":
            return word[::-1]
        case "initial":
            return word[0]
        case "length":
            return str(len(word))
        case "next":
            return _NEXT[word]
        case "lookup":
            return _LOOKUP[word]
    raise ValueError(f"unknown transform skill: {skill!r}")


def _format(text: str, skill: str) -> str:
    match skill:
        case "bracket":
            return f"[{text}]"
        case "dash":
            return f"-{text}-"
        case "star":
            return f"*{text}*"
    raise ValueError(f"unknown format skill: {skill!r}")


def answer(words: Sequence[str], skills: Skills) -> str:
    """Apply a composition of skills to a list of words.

    Args:
        words: The words of one input, all from one domain.
        skills: The skills to select, transform and format with.

    Returns:
        The target string.

    Raises:
        ValueError: If a skill does not belong to the stage it is given for.
        KeyError: If a word has no successor or no entry in the look-up table.
    """
    select, transform, format_ = skills
    return _format(_transform(_select(words, select), transform), format_)


@cache
def _inputs(ordered: bool) -> tuple[tuple[str, ...], ...]:
    """All inputs: distinct words of one domain, one of them longer than all others."""
    domains = _ORDERED_DOMAINS if ordered else _DOMAINS
    return tuple(
        words
        for domain in domains
        for words in itertools.permutations(domain, _WORDS_PER_INPUT)
        if _has_unique_longest(words)
    )


def _has_unique_longest(words: Sequence[str]) -> bool:
    lengths = sorted(len(word) for word in words)
    return lengths[-1] > lengths[-2]


def sample_words(rng: random.Random, skills: Skills) -> tuple[str, ...]:
    """Draw the words of one input.

    The words are distinct, share a domain, and have a unique longest word whichever skills are
    asked for, so that an input does not give its skills away. Only `next` narrows the choice, to
    the domains that have an order.

    Args:
        rng: The source of randomness.
        skills: The skills the input is for.

    Returns:
        The words of the input.
    """
    return rng.choice(_inputs("next" in skills))


def _all_triples() -> Iterator[tuple[Skills, int, int]]:
    """Yield each composition with its level and the sum of its select and transform indices.

    The level makes a Latin square of the formats: within a level, each select and transform
    pair occurs once, and each other pair of skills at least once.
    """
    selects, transforms, formats = (
        [skill for skill, stage in SKILLS.items() if stage == wanted]
        for wanted in ("select", "transform", "format")
    )
    for (s, select), (t, transform), (f, format_) in itertools.product(
        enumerate(selects), enumerate(transforms), enumerate(formats)
    ):
        yield (select, transform, format_), (f - s - t) % len(formats), s + t


def _assign_roles() -> dict[Skills, Role | None]:
    """Give every composition its role; None marks the ones only used for pretraining.

    Half of level 0 is held out, balanced over the skills. All of level 1 is trained on, so that
    each pair of skills occurs in training. The other training tasks are drawn from the rest.
    """
    roles: dict[Skills, Role | None] = {}
    for skills, level, index_sum in _all_triples():
        held_out = level == 0 and index_sum % 2 == 0
        roles[skills] = "held-out" if held_out else "train" if level == 1 else None
    trained = sum(role == "train" for role in roles.values())
    rest = [skills for skills, role in roles.items() if role is None]
    for skills in random.Random(_SPLIT_SEED).sample(rest, _TRAINING_TASKS - trained):
        roles[skills] = "train"
    return roles


def _instruction(skills: Skills) -> str:
    select, transform, format_ = (_PHRASES[skill] for skill in skills)
    return f"{transform} {select}, {format_}."


_ROLES = _assign_roles()

TASKS: tuple[DemoTask, ...] = tuple(
    DemoTask("-".join(skills), skills, _instruction(skills), role)
    for skills, role in _ROLES.items()
    if role is not None
)
"""The training and held-out tasks of the suite."""

PRETRAINING: tuple[Skills, ...] = tuple(
    skills for skills, role in _ROLES.items() if role != "held-out"
)
"""The compositions the base model may be pretrained on: all but the held-out ones."""


def _records(task: DemoTask, seed: int, sizes: dict[str, int]) -> Iterator[dict[str, str | None]]:
    """Yield the examples of a task, all with different inputs, split after split."""
    rng = random.Random(f"{seed}:{task.name}")
    inputs = iter(rng.sample(_inputs("next" in task.skills), sum(sizes.values())))
    for split, size in sizes.items():
        for words in itertools.islice(inputs, size):
            yield {
                "task": task.name,
                "category": _CATEGORIES[task.skills[1]],
                "source": "generated",
                "licence": "Apache-2.0",
                "split": split,
                "instruction": task.instruction,
                "input": " ".join(words),
                "target": answer(words, task.skills),
                "choices": None,
            }


def write_suite(
    folder: Path, *, seed: int = 0, train: int = 400, validation: int = 40, test: int = 100
) -> None:
    """Write the suite as one JSON Lines file per task, and the roles of the tasks.

    Args:
        folder: The folder to write to, created if missing.
        seed: Decides which inputs each task gets; the tasks themselves never change.
        train: The number of training examples per task.
        validation: The number of validation examples per task.
        test: The number of test examples per task.

    Raises:
        ValueError: If a task does not have as many distinct inputs as asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": train, "validation": validation, "test": test}
    for task in TASKS:
        lines = (json.dumps(record, ensure_ascii=False) for record in _records(task, seed, sizes))
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"{task.name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    roles = {
        task.name: {
            "category": _CATEGORIES[task.skills[1]],
            "choices": False,
            "metric": "strict_match",
            "role": task.role,
        }
        for task in TASKS
    }
    text = json.dumps(roles, indent=2) + "\n"
    (folder / "roles.json").write_text(text, encoding="utf-8", newline="\n")
