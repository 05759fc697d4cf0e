import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from polyroute.data.open import open_suite
from polyroute.data.suite import Suite, TaskInfo, quiet_datasets
from polyroute.errors import InputError

ROWS = {
    "premise": ["It rains.", "It snows."],
    "hypothesis": ["It is wet.", "It is hot."],
    "label": [0, 1],
    "option1": ["cat", "red"],
    "option2": ["dog", "big"],
    "answer": ["2", "1"],
}
LABELS = ["yes", "no"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a data set as CSV and as Parquet."""
    place = tmp_path_factory.mktemp("data")
    with (place / "nli.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROWS)
        writer.writerows(zip(*ROWS.values(), strict=True))
    features = {name: datasets.Value("string") for name in ROWS}
    features["label"] = datasets.ClassLabel(names=["entailed", "not"])
    features["endings"] = datasets.List(datasets.Value("string"))
    features["source"] = {"site": datasets.Value("string")}
    rows = {**ROWS, "endings": [["a", "b"], ["c", "d"]], "source": [{"site": "x"}, {"site": "y"}]}
    whole = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (place / "local").mkdir()
    for split in ("train", "validation"):
        with quiet_datasets():
            whole.to_parquet(place / "local" / f"{split}-00000-of-00001.parquet")
    return place


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test to change."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    return tmp_path


def put(folder: Path, **tasks: Any) -> Suite:
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "ours", "tasks": tasks}))
    return open_suite(folder / "suite.yaml", cache_dir=folder / "cache")


def task(columns: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    usual = {"input": "{premise} {hypothesis}", "target": "label", "labels": LABELS}
    entry = {"path": "csv", "data_files": "nli.csv", "columns": columns or usual, **changes}
    return {key: value for key, value in entry.items() if value is not None}


def local(columns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return task(columns, path="local", data_files=None, **changes)


def test_a_yaml_file_maps_columns_of_local_files(folder: Path) -> None:
    suite = put(folder, nli=task(category="nli", role="held-out"), other=task())
    assert (suite.name, suite.tasks) == ("ours", ("nli", "other"))
    assert suite.info("nli") == TaskInfo("nli", "accuracy", "held-out", True)
    assert suite.info("other") == TaskInfo("", "accuracy", None, True)
    assert suite.splits("nli") == ("train",)
    assert suite.split("nli", "train").to_list() == [
        {"task": "nli", "instruction": "", "input": text, "target": target, "choices": LABELS}
        for text, target in [("It rains. It is wet.", "yes"), ("It snows. It is hot.", "no")]
    ]


def rows(folder: Path, columns: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    suite = put(folder, x=local(columns, **changes))
    found: list[dict[str, Any]] = suite.split("x", "train").to_list()
    return found


def test_the_splits_of_a_data_set_are_ours_or_are_mapped(folder: Path) -> None:
    columns = {"input": "premise", "target": "hypothesis"}
    assert put(folder, x=local(columns)).splits("x") == ("train", "validation")
    mapped = {"test": "validation", "train": "train[:1]"}
    suite = put(folder, x=local(columns, split=mapped))
    assert suite.splits("x") == ("train", "test")
    assert len(suite.split("x", "train")) == 1
    other = put(folder, x=local(columns, split={**mapped, "train": "train[1:]"}))
    assert other.split("x", "train")["input"][0] == "It snows."


def test_a_class_label_is_written_as_its_name(folder: Path) -> None:
    found = rows(folder, {"input": "premise", "target": "label"})
    assert [row["target"] for row in found] == ["entailed", "not"]
    assert put(folder, x=local({"input": "premise", "target": "label"})).info("x").metric == (
        "exact_match"
    )


def test_labels_and_choices_may_be_written_from_columns(folder: Path) -> None:
    options = ["{option1}", "{option2}"]
    labels = {"1": "option1", "2": "{option2}"}
    columns = {"input": "premise", "target": "answer", "labels": labels, "choices": options}
    found = rows(folder, columns)
    assert [row["target"] for row in found] == ["dog", "red"]
    assert [row["choices"] for row in found] == [["cat", "dog"], ["red", "big"]]


def test_an_answer_is_a_place_among_a_column_of_choices(folder: Path) -> None:
    found = rows(folder, {"input": "premise", "answer": "label", "choices": "endings"})
    assert [(row["target"], row["choices"]) for row in found] == [
        ("a", ["a", "b"]),
        ("d", ["c", "d"]),
    ]


def test_instructions_are_a_column_or_a_text(folder: Path) -> None:
    for instruction, expected in (
        ("Is {hypothesis} so? {{}}", "Is It is wet. so? {}"),
        ("hypothesis", "It is wet."),
        ("Say it.", "Say it."),
        ("source.site", "x"),
    ):
        columns = {"instruction": instruction, "input": "premise", "target": "label"}
        assert rows(folder, columns)[0]["instruction"] == expected


def test_several_references_are_kept(folder: Path) -> None:
    columns = {"input": "premise", "target": "option1", "references": ["{option1}", "option2"]}
    assert rows(folder, columns)[0]["references"] == ["cat", "dog"]


USUAL = {"input": "premise", "target": "label"}
WRONG: list[tuple[dict[str, Any], str]] = [
    (task(metrics="x"), "task 'x': there is no key 'metrics'; did you mean 'metric'"),
    (task({"input": "premise"}), "give either 'target'"),
    (task({**USUAL, "answer": "label"}), "give either 'target'"),
    (task({"target": "label"}), "columns: the key 'input' is missing"),
    (task({**USUAL, "inputs": "x"}), "columns: there is no key 'inputs'; did you mean 'input'"),
    (task({"input": "premise", "answer": "label"}), "'answer' is a place among 'choices'"),
    (task(columns=["a"]), "columns: write a mapping with the keys"),
    (task(path=None), "the key 'path' is missing"),
    (task(split={"dev": "train"}), "split: there is no key 'dev'"),
    (task(split={"test": True}), "split: 'test' must be the name of a split"),
    (task(role="test"), "'role' must be one of train, held-out, not \"test\""),
    (task(USUAL, metric="accuracy"), "the metric accuracy needs choices"),
    (task({"messages": "a", "input": "b"}), "'messages' is the whole example; remove the other"),
    (task({"messages": 5}), "'messages' must be the name of a column"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_a_wrong_description_is_refused_at_once(
    folder: Path, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        put(folder, x=entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (task({**USUAL, "input": "premis"}), "'premis' names no column; did you mean 'premise'"),
        (task({**USUAL, "target": "labl"}), "the target 'labl' names no column; did you mean 'lab"),
        (task({**USUAL, "target": 5}), "5 must be a text; put it in quotes"),
        (task({**USUAL, "target": ["label"]}), "must be a text; put it in quotes"),
        (task({**USUAL, "input": "{premis}"}), "needs the column 'premis'.*'premise'"),
        (task({**USUAL, "input": "{premise"}), "write {{ for a brace"),
        (task({**USUAL, "input": "{premise.__class__}"}), r"needs the column 'premise.__class__'"),
        (task({**USUAL, "input": "{premise!r}"}), "put only the name of a column between braces"),
        (task({**USUAL, "labels": [True, False]}), "True must be a text; put it in quotes"),
        (
            task({**USUAL, "labels": ["y", "n"], "target": "answer"}),
            r"row 0 of 'train': 'labels' has no '2'",
        ),
        (task({**USUAL, "choices": "ending"}), "needs the column 'ending'"),
        (
            task({"input": "premise", "answer": "answer", "choices": ["a", "b"]}),
            "row 0 of 'train': 'answer' must name a column .* 'answer' is 2",
        ),
        (task(data_files="gone.csv"), r"task 'x': csv cannot be loaded .*gone\.csv"),
        (task(data_files=None), "the path 'csv' is a format; add 'data_files'"),
        (local(USUAL, split={"test": "dev"}), "cannot be loaded"),
        (task(USUAL), "row 0 of 'train': the column 'label' is a number.*\"{label}\".*labels"),
        (task({**USUAL, "input": "label"}), "row 0 of 'train': the column 'label' is a number"),
        (local({**USUAL, "input": "endings"}), "row 0 of 'train': the column 'endings' is a list"),
        (local({**USUAL, "input": "Of {endings}"}), "the column 'endings' is a list, not text"),
        (local({**USUAL, "target": "endings"}), "row 0 of 'train': the column 'endings' is a list"),
        (local({**USUAL, "target": "endings", "labels": LABELS}), "'endings' is a list"),
        (local({"messages": "premise"}), "row 0 of 'train': the column 'premise' is a string, not"),
        (local({"messages": "premis"}), "the messages 'premis' names no column; did you mean"),
        (task(data_files={"dev": "nli.csv"}), "has the splits dev; say which of them to use"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    folder: Path, entry: dict[str, Any], message: str
) -> None:
    suite = put(folder, x=entry)
    with pytest.raises(InputError, match=message) as caught:
        suite.splits("x")
    assert "suite.yaml, task 'x'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {a: {path: csv}", "is not valid YAML"),
        ("tasks: {}", "'tasks' must map"),
        ("a: 1", "there is no key 'a'"),
        ("", "the key 'tasks' is missing"),
        ("- a", "must hold `option: value` lines"),
        ("tasks:\n  a: 1\n  a: 2\n", "the key 'a' in line 3 occurs twice"),
        ("tasks: {1: {}}", "the task name 1 must be a string"),
        ("tasks: {mu: {path: csv, columns: {input: a, target: b}}}", "the name kept for"),
        ("tasks: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_wrong_yaml_file_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "wrong.yml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        open_suite(folder / "wrong.yml")
    assert str(folder / "wrong.yml") in str(caught.value)


def test_a_yaml_file_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml cannot be read"):
        open_suite(folder / "gone.yaml")


def test_edited_data_is_read_again(folder: Path) -> None:
    assert len(put(folder, x=task()).split("x", "train")) == 2
    text = (folder / "nli.csv").read_text()
    (folder / "nli.csv").write_text(text + "A,B,1,c,d,1\n")
    assert len(put(folder, x=task()).split("x", "train")) == 3


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("nli.csv", {}),
        ("nli.csv", {"data_files": {"train": ["n*.csv"]}}),
        ("tables/nli.csv", {"path": "tables", "data_files": None}),
    ],
)
def test_local_data_of_the_same_size_and_time_is_read_again(
    folder: Path, file: str, changes: dict[str, Any]
) -> None:
    text, place = (folder / "nli.csv").read_text(), folder / file
    place.parent.mkdir(exist_ok=True)
    for weather in ("rains", "hails"):
        place.write_text(text.replace("rains", weather))
        os.utime(place, (1.6e9, 1.6e9))
        read = put(folder, x=task(**changes)).split("x", "train")["input"][0]
        assert read == f"It {weather}. It is wet."


def test_two_tasks_of_the_same_rows_keep_their_names(folder: Path) -> None:
    suite = put(folder, one=task(), other=task())
    assert [suite.split(name, "train")[0]["task"] for name in suite.tasks] == ["one", "other"]


@pytest.mark.parametrize("name", ["../x", "..", "/x", "a\0b", "a//b"])
def test_a_task_whose_results_would_lie_elsewhere_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"which cannot name a folder of results|U\+0000"):
        put(folder, **{name: task()})


@pytest.mark.parametrize("changes", [{"name": ["a"]}, {"revision": 5}])
def test_a_name_of_another_kind_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be a text; put it in quotes"):
        put(folder, one=task(**changes))


def test_labels_must_be_texts_by_value(folder: Path) -> None:
    with pytest.raises(InputError, match="'labels' must be a list or a mapping"):
        put(folder, one=task({"input": "premise", "target": "label", "labels": 5}))


def put_rows(folder: Path, rows: list[dict[str, Any]], **columns: Any) -> Suite:
    """A suite of one task whose rows are JSON."""
    (folder / "rows.json").write_text(json.dumps(rows))
    return put(folder, x=task(columns, path="json", data_files="rows.json"))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "row 1 of 'train': the column 'a' is null, but an answer needs a text"),
        (True, "row 1 of 'train': the column 'a' is a boolean, .*labels: {false: "),
        (3.5, "row 1 of 'train': the column 'a' is a number, not text"),
        ({"b": "c"}, "the target 'a' names no column; did you mean 'a.b'"),
        ([{"b": "c"}], "row 1 of 'train': the column 'a' is a list"),
    ],
)
def test_a_target_that_is_no_text_is_refused(folder: Path, cell: Any, message: str) -> None:
    first = "text" if cell is None else cell
    rows = [{"q": "?", "a": first}, {"q": "?", "a": cell}]
    shown = message if cell is None else message.replace("row 1", "row 0")
    with pytest.raises(InputError, match=shown):
        put_rows(folder, rows, input="q", target="a").splits("x")


def test_braces_write_numbers_as_text_and_labels_name_them(folder: Path) -> None:
    rows = [{"q": 1, "score": 3.5, "so": True, "note": None}]
    suite = put_rows(folder, rows, input="{q}{note}", target="{score}")
    assert suite.split("x", "train")[0] | {"task": ""} == {
        "task": "", "instruction": "", "input": "1", "target": "3.5", "choices": None,
    }  # fmt: skip
    labels = {False: "no", True: "yes"}
    named = put_rows(folder, rows, input="{q}", target="so", labels=labels)
    assert named.split("x", "train")["target"][:] == ["yes"]


def test_an_option_or_a_reference_must_not_be_null(folder: Path) -> None:
    rows = [{"q": "?", "a": "x", "b": "y"}, {"q": "?", "a": "x", "b": None}]
    for key in ("choices", "references"):
        with pytest.raises(InputError, match="row 1 of 'train': the column 'b' is null"):
            put_rows(folder, rows, input="q", target="a", **{key: ["a", "b"]}).splits("x")


def test_a_class_label_without_a_name_is_refused(folder: Path) -> None:
    features = {"q": datasets.Value("string"), "a": datasets.ClassLabel(names=LABELS)}
    whole = datasets.Dataset.from_dict(
        {"q": ["?", "?"], "a": [1, -1]}, features=datasets.Features(features)
    )
    with quiet_datasets():
        whole.to_parquet(folder / "local" / "test-00000-of-00001.parquet")
        (folder / "local" / "train-00000-of-00001.parquet").unlink()
        (folder / "local" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="row 1 of 'test': the column 'a' is -1, which names no"):
        put(folder, x=local({"input": "q", "target": "a"})).splits("x")
