import datasets
import numpy as np
import pytest

from polyroute.errors import InputError
from polyroute.study.examples import prompt_lengths, task_sizes

FEATURES = datasets.Features(
    {"task": datasets.Value("string"), "prompt_ids": [datasets.Value("int32")]}
)


def rows_of(tasks: str) -> datasets.Dataset:
    """One row per letter, the task's name; the prompt of row i has i tokens."""
    columns = {"task": list(tasks), "prompt_ids": [list(range(i)) for i in range(len(tasks))]}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


@pytest.mark.parametrize(("tasks", "sizes"), [("a", [1]), ("aab", [2, 1]), ("bbbac", [3, 1, 1])])
def test_the_sizes_of_tasks_are_in_order_of_appearance(tasks: str, sizes: list[int]) -> None:
    assert task_sizes(rows_of(tasks)) == sizes


def test_the_sizes_of_tasks_count_the_selected_rows() -> None:
    rows = rows_of("abaab")
    assert task_sizes(rows.select([0, 2, 4])) == [2, 1]
    assert task_sizes(rows.select(range(2, 5))) == [2, 1]


def test_the_sizes_of_tasks_count_across_joined_tables() -> None:
    assert task_sizes(datasets.concatenate_datasets([rows_of("aab"), rows_of("bc")])) == [2, 2, 1]


@pytest.mark.parametrize(("tasks", "named"), [("abaa", "a"), ("abcb", "b"), ("aabba", "a")])
def test_a_task_in_several_runs_is_refused(tasks: str, named: str) -> None:
    with pytest.raises(InputError, match=f"must follow one another, but those of '{named}' do not"):
        task_sizes(rows_of(tasks))


def test_a_selection_that_interleaves_tasks_is_refused() -> None:
    with pytest.raises(InputError, match="the rows of a task must follow one another"):
        task_sizes(rows_of("aab").select([0, 2, 1]))


def test_prompt_lengths_are_those_of_the_rows() -> None:
    lengths = prompt_lengths(rows_of("abcd"))
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [0, 1, 2, 3]


def test_prompt_lengths_follow_a_selection() -> None:
    rows = rows_of("abcdef")
    assert prompt_lengths(rows.select([5, 0, 3])).tolist() == [5, 0, 3]
    assert prompt_lengths(rows.select(range(2, 5))).tolist() == [2, 3, 4]
    joined = datasets.concatenate_datasets([rows.select(range(4, 6)), rows.select([1])])
    assert prompt_lengths(joined).tolist() == [4, 5, 1]
