"""Scoring a routed model on the tasks of a suite."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from polyroute.data.metrics import (
    acceptable_answers,
    baselines,
    best_match,
    mean_and_error,
    text_metric,
)
from polyroute.data.sampling import some_places
from polyroute.data.suite import Suite, check_tasks
from polyroute.errors import InputError
from polyroute.host.progress import progress
from polyroute.kinds.batches import evaluating
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.routes.rule import RouteRule
from polyroute.settings import whole
from polyroute.study.base_alone import BaseAlone
from polyroute.study.examples import encoded, prompt_lengths, warn_of_cuts

__all__ = [
    "NotFiniteError",
    "Questions",
    "TaskScore",
    "check_answerable",
    "evaluate",
    "macro_average",
    "questions",
    "row_scores",
    "score_rows",
]


class NotFiniteError(InputError):
    """What a model computes is NaN or infinite, so that no answer of its is better than another."""

    def __init__(self, task: str) -> None:
        super().__init__(
            f"the model's losses on task {task!r} are not finite, so it has no score: train at a "
            "lower rate, take an earlier checkpoint, or load the base model in float32"
        )


@dataclass(frozen=True)
class TaskScore:
    """How well one task is answered; every score lies between 0 and 1."""

    task: str
    metric: str
    """What `score` measures: `accuracy` for tasks with choices, otherwise `exact_match`,
    `strict_match` or `rougeL`."""
    score: float
    """For tasks with choices, the share of examples whose target has the highest summed
    log-probability; where n choices tie for the highest and the target is among them, the example
    counts 1/n. Otherwise the mean metric of generated text."""
    score_normalised: float | None
    """The same by log-probability per token, for tasks with choices."""
    majority: float | None
    """The score of the most frequent training target; None without a training split."""
    chance: float | None
    """The score of a random choice; None for tasks without choices."""
    num_examples: int

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Questions:
    """Rows of one task to be answered, and what a good answer is; made by `questions`."""

    rows: datasets.Dataset
    """The encoded rows."""
    answers: Sequence[str | Sequence[str]]
    """For each row its acceptable answer or, where there are several, a list of them, of which the
    nearest counts. Answers by choice are compared with the row's label instead."""
    metric: str
    """See `TaskScore.metric`."""

    def select(self, indices: Sequence[int]) -> "Questions":
        """Only some of the rows."""
        chosen = list(indices)
        return Questions(self.rows.select(chosen), [self.answers[i] for i in chosen], self.metric)


def questions(suite: Suite, task: str, split: str, kind: ModelKind) -> Questions:
    """One split of one task, to be answered.

    Raises:
        InputError: the data cannot be read, or the task has no such split.
    """
    answers = acceptable_answers(suite.split(task, split))
    return Questions(encoded(suite, task, split, kind), answers, suite.info(task).metric)


def check_answerable(suite: Suite, tasks: Sequence[str], kind: ModelKind) -> None:
    """Make sure that a base model can answer these tasks at all.

    Raises:
        InputError: a task asks for text, and the base model is an encoder.
    """
    for task in tasks:
        if not kind.supports_generation and not suite.info(task).has_choices:
            raise InputError(
                f"task {task!r} has no choices, and an encoder base model writes no text: leave "
                "the task out, or use a text-generating base model"
            )


def evaluate(  # noqa: PLR0913 (public: users know its keywords)
    model: RoutedModel | BaseAlone,
    kind: ModelKind,
    suite: Suite,
    tasks: Sequence[str],
    *,
    route: str | RouteRule | None = None,
    split: str = "test",
    batch_size: int = 32,
    max_examples: int | None = None,
) -> list[TaskScore]:
    """Score the model on one split of each task.

    Args:
        model: the routed model, or a base model alone.
        kind: how its base model answers.
        suite: where the tasks are.
        tasks: their names.
        route: the task, or `"mu"`, that all examples are routed as, or a rule that stands alone;
            None routes each as itself.
        split: a split of the suite.
        batch_size: examples in a forward.
        max_examples: the most examples of each task, the same ones each time; None for all.

    Raises:
        InputError: a task has no route or no such split, is named twice or cannot be answered; a
            number is out of range; or the model's losses are not finite.
    """
    whole()("batch_size", batch_size)
    tasks = check_tasks(suite, tasks)
    if isinstance(model, RoutedModel) and not isinstance(route, RouteRule):
        for task in tasks:
            model.routes.row(task if route is None else route)
    check_answerable(suite, tasks, kind)
    found = []
    chosen = {task: some_places(len(suite.split(task, split)), max_examples) for task in tasks}
    all_asked = {
        task: questions(suite, task, split, kind).select(places) for task, places in chosen.items()
    }
    warn_of_cuts([asked.rows for asked in all_asked.values()], kind)
    for task, asked in progress(list(all_asked.items()), "evaluating"):
        score, normalised = score_rows(
            model, kind, asked, route=task if route is None else route, batch_size=batch_size
        )
        train = suite.split(task, "train") if "train" in suite.splits(task) else None
        test = suite.split(task, split).select(chosen[task])
        simple = baselines(train, test, metric=asked.metric)
        count = len(asked.rows)
        found.append(
            TaskScore(task, asked.metric, score, normalised, simple.majority, simple.chance, count)
        )
    return found


def score_rows(
    model: RoutedModel | BaseAlone,
    kind: ModelKind,
    asked: Questions,
    *,
    route: str | RouteRule,
    batch_size: int = 32,
) -> tuple[float, float | None]:
    """Mean score of the rows of one task.

    For accuracy a row counts 1/n where n choices have exactly the best score and the label is among
    them. Choices that are equal once cut to `max_target` always tie; a warning says so.

    Args:
        model: the routed model.
        kind: how its base model answers.
        asked: the rows, and what a good answer is.
        route: the task, `"mu"` or rule that the rows are routed as.
        batch_size: examples in a forward.

    Returns:
        The score and, for accuracy, the score by log-probability per token.

    Raises:
        InputError: the batch size is no positive number, or the model's losses are not finite (a
            `NotFiniteError`).
    """
    found = np.array(row_scores(model, kind, asked, route=route, batch_size=batch_size))
    score, *normalised = found.mean(0).tolist()
    return score, normalised[0] if normalised else None


def row_scores(
    model: RoutedModel | BaseAlone,
    kind: ModelKind,
    asked: Questions,
    *,
    route: str | RouteRule,
    batch_size: int = 32,
) -> list[list[float]]:
    """The score of each row, in order, and for accuracy also the one by log-probability per token.

    The arguments and errors are those of `score_rows`.
    """
    whole()("batch_size", batch_size)
    count = len(asked.rows)
    task = asked.rows[0]["task"] if count else ""
    what = f"scoring {task}" if count else "scoring"
    found: list[list[float]] = [[] for _ in range(count)]
    with progress(what=what, unit="example", total=count) as bar:
        batches = _counted(_batches(asked.rows, batch_size, route), bar)
        if asked.metric == "accuracy":
            for index, shares in _hits(model, kind, batches, task):
                found[index] = shares
            return found
        compare = text_metric(asked.metric)
        for number, batch in enumerate(batches):
            if number == 0:
                _check_finite(model, kind, batch[0], task)
            for row, answer in zip(batch, kind.generate(model, batch), strict=True):
                index = row["index"]
                found[index] = [best_match(compare, answer, asked.answers[index])]
    return found


def _counted(batches: Iterator[list[dict[str, Any]]], bar: Any) -> Iterator[list[dict[str, Any]]]:
    """The batches; a bar counts the rows of those that are done."""
    for batch in batches:
        yield batch
        bar.update(len(batch))


def _check_finite(
    model: RoutedModel | BaseAlone, kind: ModelKind, row: dict[str, Any], task: str
) -> None:
    """Make sure that a model that writes text computes numbers, since NaN too becomes some text."""
    if kind.needs_choices:  # its loss cannot be that of a text
        return
    with evaluating(model), torch.no_grad():
        loss = kind.loss(model, kind.collate([row]))
    if not loss.isfinite():
        raise NotFiniteError(task)


def _hits(
    model: RoutedModel | BaseAlone,
    kind: ModelKind,
    batches: Iterator[list[dict[str, Any]]],
    task: str,
) -> Iterator[tuple[int, list[float]]]:
    """For each row its place, and whether its label scores best, by sum and by mean over tokens."""
    is_warned = False
    for batch in batches:
        for row, scores in zip(batch, kind.scores(model, batch), strict=True):
            # One choice may be impossible, but where all are there is none to prefer.
            if scores.isnan().any() or not scores.isfinite().any(0).all():
                raise NotFiniteError(task)
            firsts = _first_equal(row["choice_ids"])
            if not is_warned and firsts != list(range(len(firsts))):
                is_warned = True
                warnings.warn(
                    f"two choices of an example routed as {_called(row['task'])} are the same "
                    f"{kind.max_target} tokens: raise max_target to tell them apart",
                    stacklevel=3,
                )
            columns = range(scores.shape[1])
            yield row["index"], [_share(scores[firsts, c], row["label"]) for c in columns]


def _called(route: str | RouteRule) -> str:
    return repr(route) if isinstance(route, str) else type(route).__name__


def _first_equal(choices: Sequence[Sequence[int]]) -> list[int]:
    """For each choice, the place of the first one with the same tokens."""
    places: dict[tuple[int, ...], int] = {}
    return [places.setdefault(tuple(ids), i) for i, ids in enumerate(choices)]


def _share(scores: Tensor, label: int) -> float:
    """1 if the label is the best choice, 1/n if it is one of n best ones, otherwise 0."""
    is_best = scores == scores.max()
    return 1 / int(is_best.sum()) if label >= 0 and is_best[label] else 0.0


def _batches(
    rows: datasets.Dataset, batch_size: int, route: str | RouteRule
) -> Iterator[list[dict[str, Any]]]:
    """Rows in batches of similar length, to save padding; `index` is the place of a row."""
    order = np.argsort(prompt_lengths(rows), kind="stable").tolist()
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        yield [{**rows[i], "task": route, "index": i} for i in chosen]


def macro_average(scores: Sequence[TaskScore]) -> dict[str, float | None]:
    """The mean score over tasks with its standard error, and the mean of each baseline."""
    mean, error = mean_and_error([s.score for s in scores])
    majorities = [s.majority for s in scores if s.majority is not None]
    chances = [s.chance for s in scores if s.chance is not None]
    return {
        "score": mean,
        "standard_error": error,
        "majority": mean_and_error(majorities)[0] if majorities else None,
        "chance": mean_and_error(chances)[0] if chances else None,
    }
