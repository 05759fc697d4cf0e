"""What a suite of tasks is, whatever its format: the protocol that every reader fulfils.

An example is a row with the columns `COLUMNS` in one of the `SPLITS` of its task.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import datasets
import pyarrow.compute as pc

from polyroute.errors import InputError, did_you_mean, first_few
from polyroute.host.progress import progress

__all__ = [
    "CHAT",
    "COLUMNS",
    "METRICS",
    "RESERVED_TASK",
    "ROLES",
    "SPLITS",
    "Metric",
    "Role",
    "Suite",
    "TaskInfo",
    "check_tasks",
    "held_out_tasks",
    "prompt",
    "quiet_datasets",
    "split_of",
    "training_tasks",
    "validate",
]

Metric = Literal["accuracy", "exact_match", "strict_match", "rougeL", "chrF"]
Role = Literal["train", "held-out"]

METRICS: tuple[str, ...] = get_args(Metric)
ROLES: tuple[str, ...] = get_args(Role)
SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {
    **{split: split for split in SPLITS},
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}
COLUMNS = ("task", "instruction", "input", "target", "choices")
CHAT = ("system", "history")
"""The further columns of a task whose examples come from conversations."""

_NAMED = 3
"""How many tasks a sentence names."""

# Stands for the average of the inventory wherever a task can be named. It equals
# `polyroute.routes.table.MU`; a test holds the two equal, so that data need not import routes.
RESERVED_TASK = "mu"


@dataclass(frozen=True)
class TaskInfo:
    """What a suite says about a task as a whole.

    Attributes:
        category: a group of related tasks; empty if the suite names none.
        metric: how predictions are scored; "accuracy" ranks the choices of an example.
        role: whether the task is for training or held out; None if the suite does not say.
        has_choices: whether its examples list the answers to choose from.
    """

    category: str
    metric: Metric
    role: Role | None
    has_choices: bool


class Suite(Protocol):
    """Named tasks with their examples; every reader of a suite offers these members."""

    @property
    def name(self) -> str:
        """What reports call the suite."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, sorted."""

    def info(self, task: str) -> TaskInfo:
        """What the suite says about a task.

        Raises:
            InputError: the suite has no such task, or its description is malformed.
        """

    def splits(self, task: str) -> tuple[str, ...]:
        """The splits that a task has, in the order of `SPLITS`; reads and checks all of its data.

        Raises:
            InputError: the suite has no such task, or its data is malformed.
        """

    def split(self, task: str, split: str) -> datasets.Dataset:
        """The examples of one split of a task, in the suite's order.

        Returns:
            At least one row, with the columns task, instruction, input, target (strings) and
            choices (a list of strings, or None for free text). If several answers are acceptable,
            there is a column references (a list of strings, the target among them). If examples of
            the task come from conversations, there is a column system (the system prompt, or None)
            or history (the turns before the input, each with role and content, or None), or both.

        Raises:
            InputError: the suite has no such task, the task has no such split, or its data is
                malformed.
        """


def training_tasks(suite: Suite) -> tuple[str, ...]:
    """The tasks to train on: all tasks that the suite does not hold out, sorted."""
    return tuple(task for task in suite.tasks if suite.info(task).role != "held-out")


def held_out_tasks(suite: Suite) -> tuple[str, ...]:
    """The tasks that the suite keeps away from training, sorted."""
    return tuple(task for task in suite.tasks if suite.info(task).role == "held-out")


def split_of(name: str) -> str | None:
    """The split that a name stands for, in upper or lower case; `dev` is the validation split."""
    return _SPLIT_NAMES.get(name.lower())


def check_tasks(suite: Suite, names: Iterable[str]) -> tuple[str, ...]:
    """Check a selection of tasks; the result keeps its order.

    Raises:
        InputError: the selection is no list or empty, names a task twice, or names a task that the
            suite does not have.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"tasks must be a list of names, not {names!r}")
    chosen = tuple(names)
    if not chosen:
        raise InputError(f"no task of the suite {suite.name!r} was chosen; name at least one")
    for position, name in enumerate(chosen):
        if name not in suite.tasks:
            raise InputError(
                f"the suite {suite.name!r} has no task {name!r}; "
                f"{did_you_mean(str(name), suite.tasks)}"
            )
        if name in chosen[:position]:
            raise InputError(f"the task {name!r} is named twice; name each task once")
    return chosen


def validate(suite: Suite, tasks: Iterable[str], *, needs: Iterable[str] = ()) -> None:
    """Read and check all data of some tasks, so that a long run fails before any work is lost.

    Shows a progress bar if this takes more than a second. Later reads use the cache. One warning
    counts the targets that are empty, whether they come from the cache or not.

    Args:
        suite: the suite.
        tasks: the names of some of its tasks.
        needs: the splits that each of the tasks must have.

    Raises:
        InputError: the data is wrong or lacks a split; the message names the first problem.
    """
    wanted = tuple(needs)
    empty: Counter[str] = Counter()
    for task in progress(check_tasks(suite, tasks), "checking tasks"):
        for split in dict.fromkeys((*suite.splits(task), *wanted)):
            empty[task] += _empty_targets(suite.split(task, split))
    _warn_of_empty(+empty)


def _empty_targets(rows: datasets.Dataset) -> int:
    # In Arrow, so that a column of a large file never becomes a list of Python objects.
    targets = rows.select_columns(["target"]).with_format("arrow")[:]["target"]
    return int(pc.sum(pc.equal(pc.utf8_trim_whitespace(targets), "")).as_py() or 0)


def _warn_of_empty(counts: Mapping[str, int]) -> None:
    """Warn of empty targets, by task; choices are never empty, so these are texts to write."""
    if not counts:
        return
    names = first_few([f"{task!r} ({count:,})" for task, count in counts.items()], _NAMED)
    total = sum(counts.values())
    warnings.warn(
        f"{total:,} {'target is' if total == 1 else 'targets are'} empty, of the "
        f"{'task' if len(counts) == 1 else 'tasks'} {names}, and the model learns to answer "
        "nothing there: remove these rows if an answer is missing",
        stacklevel=3,
    )


def prompt(instruction: str, text: str) -> str:
    """The prompt of an example: instruction and input on a line each; an empty one is left out."""
    return "\n".join(part for part in (instruction, text) if part)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the progress bars and warnings of `datasets` within the block."""
    verbosity = datasets.logging.get_verbosity()
    # HF_DATASETS_DISABLE_PROGRESS_BARS takes precedence; changing the bars would raise a warning.
    shown = (
        datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None
        and not datasets.are_progress_bars_disabled()
    )
    datasets.logging.set_verbosity_error()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
