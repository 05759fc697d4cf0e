"""Metrics: scores of predictions, scores of trivial answers, and means with their errors."""

import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]

from polyroute.errors import InputError, did_you_mean

__all__ = [
    "Baselines",
    "acceptable_answers",
    "baselines",
    "best_match",
    "chrf",
    "exact_match",
    "mean_and_error",
    "normalise_answer",
    "rouge_l",
    "strict_match",
    "text_metric",
]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Baselines:
    """Scores on a test split of answers that do not look at the example.

    Attributes:
        majority: the mean score, 0 to 1, of answering every test example with the most frequent
            training target; None without a training split, or where choices differ by example.
        chance: the expected score, 0 to 1, of a random choice; None for free text.
    """

    majority: float | None
    chance: float | None


def normalise_answer(text: str) -> str:
    """Convert to lower case, delete ASCII punctuation and collapse white space; keep articles."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_match(prediction: str, reference: str) -> float:
    """Score 1 if two answers are equal after normalisation, else 0.

    Punctuation does not count, so "-5" matches "5" and "3.5" matches "35"; this is the published
    practice. A reference that consists of punctuation, such as "+", is compared unchanged, because
    normalised it would match every such reference and the empty answer.
    """
    normalised = normalise_answer(reference)
    if not normalised:
        return float(prediction.split() == reference.split())
    return float(normalise_answer(prediction) == normalised)


def strict_match(prediction: str, reference: str) -> float:
    """Score 1 if two answers are equal apart from white space around them, else 0."""
    return float(prediction.strip() == reference.strip())


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of ROUGE-L, 0 to 1: the longest common subsequence of stemmed words.

    Words consist of ASCII letters and digits; a pair without words scores 0.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


def chrf(prediction: str, reference: str) -> float:
    """chrF, 0 to 1: the F-measure of sequences of 1 to 6 characters, with recall weighted double.

    It is the score of a single answer, which differs from the chrF of a whole corpus.

    Raises:
        InputError: sacrebleu is not installed.
    """
    return float(_chrf_scorer().sentence_score(prediction, [reference]).score) / 100


def best_match(
    metric: Callable[[str, str], float], prediction: str, answers: str | Iterable[str]
) -> float:
    """The best score of a prediction against one answer, or against several."""
    several = [answers] if isinstance(answers, str) else answers
    return max(metric(prediction, answer) for answer in several)


def acceptable_answers(rows: datasets.Dataset) -> Sequence[str | list[str]]:
    """The acceptable answers of each example of a split: its references, or else its target."""
    several = "references" in rows.column_names
    answers: Sequence[str | list[str]] = rows["references" if several else "target"]
    return answers


def text_metric(name: str) -> Callable[[str, str], float]:
    """Look up a metric of free text, a function of prediction and reference.

    Raises:
        InputError: no metric of free text has this name.
    """
    if name not in _TEXT_METRICS:
        raise InputError(
            f"there is no metric {name!r} for free text; {did_you_mean(name, _TEXT_METRICS)}"
        )
    return _TEXT_METRICS[name]


def baselines(
    train: datasets.Dataset | None, test: datasets.Dataset, *, metric: str = "exact_match"
) -> Baselines:
    """Score the most frequent training target and, if there are choices, a random choice.

    With choices an answer scores 1 if it is the target; free text is scored by `metric`. If several
    targets are equally frequent, the one that comes first in `train` is taken. There is no majority
    where the choices differ from example to example.

    Args:
        train: a split with the column `target`; None for a task without a training split.
        test: a split with the columns `target`, `choices` and, if several answers are acceptable,
            `references`.
        metric: a name that `text_metric` knows; ignored if there are choices.

    Raises:
        InputError: a split has no examples, or there is no such metric of free text.
    """
    for name, examples in (("train", train), ("test", test)):
        if examples is not None and len(examples) == 0:
            raise InputError(f"the {name} split has no examples; baselines need at least one")
    targets: Counter[str] = Counter()
    if train is not None:
        for batch in train.select_columns(["target"]).iter(batch_size=1000):
            targets.update(batch["target"])
    majority = targets.most_common(1)[0][0] if targets else None
    hits = chances = 0.0
    first = test[0]["choices"]
    fixed = all(row is None or set(row) == set(first) for row in test["choices"])
    rows = zip(test["target"], test["choices"], acceptable_answers(test), strict=True)
    for target, choices, answers in rows:
        if majority is not None and choices is None:
            hits += best_match(text_metric(metric), majority, answers)
        else:
            hits += majority == target
        chances += 0.0 if choices is None else 1 / len(choices)
    has_choices = first is not None
    # Where every example has choices of its own, no answer is frequent.
    share = None if majority is None or not fixed else hits / len(test)
    return Baselines(share, chances / len(test) if has_choices else None)


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean.

    Returns:
        The mean, and the sample standard deviation (n - 1) divided by the square root of n; None
        for a single value, from which no error can be estimated.

    Raises:
        InputError: there are no values.
    """
    numbers: Sequence[float] = list(values)
    if not numbers:
        raise InputError("there are no values to average; give at least one")
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else None
    return statistics.fmean(numbers), error


_TEXT_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "strict_match": strict_match,
    "rougeL": rouge_l,
    "chrF": chrf,
}


@cache
def _rouge_scorer() -> Any:
    # Imported at first use, because it imports NLTK, which is slow to load.
    from rouge_score import rouge_scorer  # type: ignore[import-untyped, unused-ignore]

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _chrf_scorer() -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise InputError("the metric 'chrF' needs sacrebleu: pip install sacrebleu") from error
    return CHRF()
