import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import made, t5
from datasets import Dataset
from models import routed
from torch import Tensor

from polyroute import InputError
from polyroute.data.open import open_suite
from polyroute.study.evaluate import (
    Questions,
    TaskScore,
    evaluate,
    macro_average,
    score_rows,
)


class Fixed:
    """A kind whose scores are given, by the row's place."""

    max_target = 4

    def __init__(self, *scores: list[float]) -> None:
        self.given = scores

    def scores(self, _: object, rows: list[dict[str, Any]]) -> list[Tensor]:
        return [torch.tensor([self.given[row["index"]]] * 2).t() for row in rows]


def table(*choices: list[list[int]], labels: list[int]) -> Dataset:
    return Dataset.from_dict(
        {
            "task": ["x"] * len(labels),
            "prompt_ids": [[1]] * len(labels),
            "target_ids": [[1]] * len(labels),
            "choice_ids": list(choices),
            "label": labels,
        }
    )


def accuracy(kind: Any, rows: Dataset) -> float:
    model: Any = None
    score, normalised = score_rows(model, kind, Questions(rows, [], "accuracy"), route="x")
    assert score == normalised
    return score


@pytest.mark.parametrize(
    ("scores", "label", "expected"),
    [
        ([-1.0, -2.0, -3.0], 0, 1.0),
        ([-1.0, -2.0, -3.0], 1, 0.0),
        ([-1.0, -1.0, -3.0], 0, 0.5),
        ([-1.0, -1.0, -3.0], 1, 0.5),
        ([-1.0, -1.0, -3.0], 2, 0.0),
        ([-1.0, -1.0, -1.0], 2, 1 / 3),
        ([-1.0, -1.0, -1.0], -1, 0.0),
        ([-1.0, -math.inf, -3.0], 0, 1.0),
        ([-1.0, -math.inf, -3.0], 1, 0.0),
    ],
)
def test_a_tie_counts_a_share(scores: list[float], label: int, expected: float) -> None:
    rows = table([[1], [2], [3]], labels=[label])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accuracy(Fixed(scores), rows) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [[math.nan] * 3, [-1.0, math.nan, -2.0], [-math.inf] * 3])
def test_what_is_not_finite_is_no_score(scores: list[float]) -> None:
    with pytest.raises(InputError, match=r"losses on task 'x' are not finite.*lower rate"):
        accuracy(Fixed(scores), table([[1], [2], [3]], labels=[0]))


def test_choices_cut_to_the_same_tokens_tie_and_are_warned_of_once() -> None:
    same = [[5, 6], [5, 6], [7]]
    rows = table(same, same, same, labels=[0, 1, 2])
    # The same tokens may get scores that differ by rounding.
    kind = Fixed([-1.0, -1.0000001, -2.0], [-1.0, -0.9999999, -2.0], [-1.0, -1.0, -2.0])
    with pytest.warns(UserWarning, match="same 4 tokens: raise max_target") as caught:
        assert accuracy(kind, rows) == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert len(caught) == 1


def write(folder: Path, *splits: str) -> None:
    records = [
        {"instruction": "Say.", "input": str(i), "target": ["yes", "no"][i % 2],
         "choices": ["yes", "no"], "split": split}
        for split in splits
        for i in range(4)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    name = "-".join(splits)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_task_without_a_training_split_has_no_majority(tmp_path: Path) -> None:
    write(tmp_path / "suite", "test")
    write(tmp_path / "suite", "train", "test")
    wrapper, kind = made(t5)
    model = routed(wrapper.base_model, ("test", "train-test"), num_heads=4)
    suite = open_suite(tmp_path / "suite")
    scores = evaluate(model, kind, suite, ["test", "train-test"])
    assert [s.majority for s in scores] == [None, 0.5]
    assert macro_average(scores)["majority"] == 0.5
    assert macro_average(scores[:1])["majority"] is None
    assert all(isinstance(s, TaskScore) and s.chance == 0.5 for s in scores)


@pytest.mark.parametrize("has_choices", [True, False])
def test_a_model_that_answers_nan_is_refused(tmp_path: Path, has_choices: bool) -> None:
    write(tmp_path / "suite", "test")
    if not has_choices:
        path = tmp_path / "suite" / "test.jsonl"
        path.write_text(path.read_text().replace('["yes", "no"]', "null"))
    wrapper, kind = made(t5)
    model = routed(wrapper.base_model, ("test",), num_heads=4)
    with torch.no_grad():
        next(model.inventory.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match="losses on task 'test' are not finite"):
        evaluate(model, kind, open_suite(tmp_path / "suite"), ["test"])


@pytest.mark.parametrize(
    ("tasks", "given", "message"),
    [
        (["test"], {"max_examples": -1}, "max_examples must be a positive whole number, not -1"),
        (["test"], {"max_examples": 0}, "max_examples must be a positive whole number, not 0"),
        (["test"], {"max_examples": 1.5}, "max_examples must be a positive whole number, not 1.5"),
        (["test"], {"batch_size": 0}, "batch_size must be a positive whole number, not 0"),
        (["test"], {"batch_size": 1.5}, "batch_size must be a positive whole number, not 1.5"),
        ([], {}, "name at least one"),
        ("test", {}, "tasks must be a list of names, not 'test'"),
        (5, {}, "tasks must be a list of names, not 5"),
        ([5], {}, "has no task 5"),
        (["test", "test"], {}, "the task 'test' is named twice"),
        (["tset"], {}, "has no task 'tset'; did you mean 'test'"),
        (["test"], {"split": "tset"}, "there is no split 'tset'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, tasks: Any, given: dict[str, Any], message: str
) -> None:
    write(tmp_path / "suite", "test")
    wrapper, kind = made(t5)
    model = routed(wrapper.base_model, ("test",), num_heads=4)
    with pytest.raises(InputError, match=message):
        evaluate(model, kind, open_suite(tmp_path / "suite"), tasks, **given)
