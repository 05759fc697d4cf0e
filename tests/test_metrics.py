import math
import string
import sys

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyroute.data.metrics import (
    _chrf_scorer,
    baselines,
    best_match,
    chrf,
    exact_match,
    mean_and_error,
    normalise_answer,
    rouge_l,
    strict_match,
    text_metric,
)
from polyroute.data.suite import METRICS
from polyroute.errors import InputError

WORDS = st.text(string.ascii_letters + string.digits + " .,!-", max_size=30)
NUMBERS = st.floats(-1e6, 1e6)


def table(targets: list[str], choices: list[list[str] | None] | None = None) -> datasets.Dataset:
    features = datasets.Features(
        {
            "target": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
        }
    )
    columns = {"target": targets, "choices": choices or [None] * len(targets)}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  The\tCat,\n sat. ", "the cat sat"),
        ("a dog", "a dog"),
        ("don't", "dont"),
        ("ÄRGER“ …", "ärger“ …"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@given(st.text(string.printable))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@given(st.text())
def test_an_answer_matches_itself(text: str) -> None:
    assert exact_match(text, text) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Yes.", "yes", 1.0),
        ("the yes", "yes", 0.0),
        ("3.5", "35", 1.0),
        ("+", "-", 0.0),
        (" + ", "+", 1.0),
        ("", "+", 0.0),
        ("...", "yes", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match_ignores_case_punctuation_and_white_space(
    prediction: str, reference: str, score: float
) -> None:
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # The common subsequence is "the cat on mat": precision 4/4, recall 4/6.
        ("the cat on mat", "the cat sat on the mat", 0.8),
        # "mat sat" can keep one word of "sat mat": precision and recall 1/2.
        ("mat sat", "sat mat", 0.5),
        ("Jumping", "jumps", 1.0),
        ("", "word", 0.0),
        ("word", "other", 0.0),
        ("…", "…", 0.0),
    ],
)
def test_rouge_l_equals_the_hand_computation(prediction: str, reference: str, score: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        (" Yes.\n", "Yes.", 1.0),
        ("yes.", "\tyes. ", 1.0),
        ("Yes.", "yes.", 0.0),
        ("yes", "yes.", 0.0),
        ("3.5", "35", 0.0),
        ("a  b", "a b", 0.0),
        ("", " ", 1.0),
    ],
)
def test_strict_match_ignores_white_space_around_the_answer_alone(
    prediction: str, reference: str, score: float
) -> None:
    assert strict_match(prediction, reference) == score


def test_text_metrics_are_found_by_the_name_a_suite_gives_them() -> None:
    functions = {"exact_match": exact_match, "strict_match": strict_match, "rougeL": rouge_l}
    assert {name: text_metric(name) for name in functions} == functions


@pytest.mark.parametrize(
    ("name", "offer"), [("rouge", "did you mean 'rougeL'"), ("accuracy", "known: .*'exact_match'")]
)
def test_a_name_of_no_text_metric_gets_an_offer(name: str, offer: str) -> None:
    with pytest.raises(InputError, match=f"there is no metric {name!r} .*{offer}"):
        text_metric(name)


@given(WORDS, WORDS)
def test_rouge_l_is_symmetric_and_between_0_and_1(first: str, second: str) -> None:
    score = rouge_l(first, second)
    assert 0.0 <= score <= 1.0
    assert score == pytest.approx(rouge_l(second, first))


def test_chrf_equals_the_hand_computation() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    assert chrf("abc", "abc") == pytest.approx(1.0)
    assert chrf("xyz", "abc") == 0.0
    # "abd" and "abc" share 2 of 3 letters, 1 of 2 pairs and no triple: precision and recall 7 / 18.
    assert chrf("abd", "abc") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    several = ["a cat ran", "the cat sat on it"]
    expected = sacrebleu.sentence_chrf("the cat ran on", several).score / 100
    assert best_match(chrf, "the cat ran on", several) == pytest.approx(expected)
    assert text_metric("chrF") is chrf


def test_chrf_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    _chrf_scorer.cache_clear()
    with pytest.raises(InputError, match="'chrF' needs sacrebleu: pip install sacrebleu"):
        chrf("a", "a")


def test_every_metric_of_text_can_be_named_by_a_suite() -> None:
    pytest.importorskip("sacrebleu")
    for name in METRICS:
        if name != "accuracy":
            assert text_metric(name)("a cat", "a cat") == pytest.approx(1.0)


def test_the_majority_baseline_is_the_share_of_the_most_frequent_training_target() -> None:
    train = table(["no", "yes", "yes"])
    test = table(["yes", "no", "no", "no"], [["yes", "no"]] * 4)
    result = baselines(train, test)
    assert (result.majority, result.chance) == (0.25, 0.5)


def test_without_a_training_split_there_is_no_majority() -> None:
    for choices in (None, [["yes", "no"]] * 2):
        test = table(["yes", "no"], choices) if choices else table(["yes", "no"])
        result = baselines(None, test)
        assert (result.majority, result.chance) == (None, 0.5 if choices else None)


def test_chance_is_averaged_over_examples_with_different_choices() -> None:
    test = table(["a", "b"], [["a", "b"], ["a", "b", "c", "d"]])
    assert baselines(table(["z"]), test).chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_a_majority_that_is_never_a_choice_scores_0() -> None:
    assert baselines(table(["z", "z", "a"]), table(["a"], [["a", "b"]])).majority == 0.0


def test_choices_are_compared_exactly_but_free_text_is_normalised() -> None:
    train = table(["Paris."])
    assert baselines(train, table(["paris"], [["paris", "Paris."]])).majority == 0.0
    free = baselines(train, table(["paris", "Rome"]))
    assert (free.majority, free.chance) == (0.5, None)


@pytest.mark.parametrize(
    ("metric", "score"),
    [("exact_match", 1 / 2), ("strict_match", 0.0), ("rougeL", (1 + 2 / 3) / 2)],
)
def test_free_text_is_compared_by_the_metric_asked_for(metric: str, score: float) -> None:
    test = table(["the cat", "cat"])  # "The cat." has a precision of 1/2 and a recall of 1
    result = baselines(table(["The cat."]), test, metric=metric)
    assert result.majority == pytest.approx(score)


def test_the_metric_is_not_looked_at_where_there_are_choices() -> None:
    test = table(["a"], [["a", "A"]])
    assert baselines(table(["A"]), test, metric="exact_match").majority == 0.0
    assert baselines(table(["a"]), test, metric="accuracy").majority == 1.0


def test_an_unknown_metric_of_free_text_is_refused() -> None:
    with pytest.raises(InputError, match="no metric 'accuracy' for free text"):
        baselines(table(["a"]), table(["a"]), metric="accuracy")


def test_the_first_of_equally_frequent_targets_is_taken() -> None:
    assert baselines(table(["b", "a", "a", "b"]), table(["b"])).majority == 1.0


def test_baselines_see_only_the_selected_rows() -> None:
    train = table(["a", "a", "b"]).select([2])
    test = table(["a", "b", "a"]).select([1])
    assert baselines(train, test).majority == 1.0


@pytest.mark.parametrize(("num_train", "num_test", "name"), [(0, 1, "train"), (1, 0, "test")])
def test_baselines_refuse_an_empty_split(num_train: int, num_test: int, name: str) -> None:
    with pytest.raises(InputError, match=f"the {name} split has no examples"):
        baselines(table(["a"] * num_train), table(["a"] * num_test))


def test_mean_and_error_equal_the_hand_computation() -> None:
    # Deviations -2, 0, 2: variance 8 / 2 = 4, error sqrt(4 / 3).
    assert mean_and_error([1.0, 3.0, 5.0]) == (3.0, pytest.approx(math.sqrt(4 / 3)))


@given(NUMBERS)
def test_a_single_value_has_no_error(value: float) -> None:
    assert mean_and_error([value]) == (value, None)


@given(NUMBERS, st.integers(2, 20))
def test_equal_values_have_no_spread(value: float, count: int) -> None:
    assert mean_and_error(iter([value] * count)) == (pytest.approx(value), 0.0)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_the_mean_lies_among_the_values(values: list[float]) -> None:
    mean, _ = mean_and_error(values)
    assert min(values) - 1e-9 <= mean <= max(values) + 1e-9


def test_no_values_have_no_mean() -> None:
    with pytest.raises(InputError, match="no values to average"):
        mean_and_error([])
