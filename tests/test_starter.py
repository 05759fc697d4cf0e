"""The starter suite: real tasks with licences that travel with the package."""

import re
from pathlib import Path

import pytest

import polyroute as pr
from polyroute.data import open as opening
from polyroute.data.suite import Suite, held_out_tasks, training_tasks, validate

FOLDER = Path(opening.__file__).parent / "starter"
OPEN = {"CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "MIT", "Apache-2.0"}


@pytest.fixture(scope="module")
def suite() -> Suite:
    return pr.open_suite("starter")


def test_it_has_training_and_held_out_tasks_of_several_kinds(suite: Suite) -> None:
    training, held_out = training_tasks(suite), held_out_tasks(suite)
    assert (len(training), len(held_out)) == (16, 8)
    validate(suite, suite.tasks, needs=["train", "validation", "test"])
    assert len({suite.info(task).category for task in suite.tasks}) >= 8
    assert {suite.info(task).metric for task in suite.tasks} == {"accuracy", "exact_match"}


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2e6


def test_no_question_of_a_test_split_is_in_a_training_split(suite: Suite) -> None:
    for task in suite.tasks:
        seen = {(row["input"], str(row["choices"])) for row in suite.split(task, "train")}
        assert not seen & {(r["input"], str(r["choices"])) for r in suite.split(task, "test")}


def test_every_task_names_its_source_and_an_open_licence(suite: Suite) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (train|held-out) .*\| \[.*\]\((.*)\) \| (.*) \|$", page, re.M)
    assert {name for name, *_ in rows} == set(suite.tasks)
    for name, role, address, licence in rows:
        assert suite.info(name).role == role
        assert address.startswith("https://github.com/")
        named = set(
            re.findall(r"CC0-1\.0|CC-BY(?:-\w+)?-\d\.0|MIT|Apache-2\.0|[A-Z]+-SA\S*", licence)
        )
        assert named, licence
        assert named <= OPEN, licence


def test_a_folder_of_the_same_name_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starter").mkdir()
    (tmp_path / "starter" / "mine.jsonl").write_text('{"input": "a", "target": "b"}\n')
    monkeypatch.chdir(tmp_path)
    assert pr.open_suite("./starter").tasks == ("mine",)
    assert len(pr.open_suite("starter").tasks) == 24
