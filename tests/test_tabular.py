import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyroute.data.open import open_suite
from polyroute.data.readers.tabular import TabularSuite
from polyroute.data.suite import Suite, TaskInfo, validate
from polyroute.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tables"
    path.mkdir()
    return path


def put(folder: Path, **texts: str) -> Suite:
    """Write files, `a_train_csv` for `a.train.csv`, and open the suite."""
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return open_suite(folder, cache_dir=folder.parent / "cache")


def test_a_csv_file_is_a_task_and_a_column_tells_its_splits(folder: Path) -> None:
    suite = put(
        folder,
        a_csv="\ufeffinput,target,split,more\n"
        '"1, 2",x,train,m\n\n"line\nbreak","say ""y""",test,m\n',
    )
    assert (suite.name, suite.tasks, suite.splits("a")) == ("tables", ("a",), ("train", "test"))
    usual = {"task": "a", "instruction": "", "choices": None}
    assert suite.split("a", "train").to_list() == [{**usual, "input": "1, 2", "target": "x"}]
    row = {**usual, "input": "line\nbreak", "target": 'say "y"'}
    assert suite.split("a", "test").to_list() == [row]
    assert suite.info("a") == TaskInfo("", "exact_match", None, False)


def test_rows_of_no_split_are_for_training(folder: Path) -> None:
    suite = put(folder, a_csv="input,target,split\nq,x,\n")
    assert suite.splits("a") == ("train",)
    with pytest.raises(InputError, match=r"no 'test' split; add such records to .*a\.csv"):
        suite.split("a", "test")


def test_each_split_may_have_a_file_of_its_own_kind(folder: Path) -> None:
    table = pa.table({"input": ["p"], "target": ["no"], "choices": [["yes", "no"]]})
    pq.write_table(table, folder / "v1.1.test.parquet")
    line = json.dumps({"input": "j", "target": "yes", "choices": ["yes", "no"]})
    (folder / "v1.1.validation.jsonl").write_text(line + "\n")
    (folder / "v1.1.train.csv").write_text("input,target,choices\nc,yes,yes|no\n")
    suite = open_suite(folder, cache_dir=folder.parent / "cache")
    assert suite.tasks == ("v1.1",)
    assert [suite.split("v1.1", s)["input"][0] for s in ("train", "validation", "test")] == [
        "c",
        "j",
        "p",
    ]
    assert suite.info("v1.1") == TaskInfo("", "accuracy", None, True)


@pytest.mark.parametrize("cell", ["yes|no", " yes | no ", '["yes", "no"]', '"[""yes"",""no""]"'])
def test_choices_are_written_with_bars_or_as_json(folder: Path, cell: str) -> None:
    quoted = cell if cell.startswith('"') else '"' + cell.replace('"', '""') + '"'
    suite = put(folder, a_csv=f"input,target,choices\nq,no,{quoted}\n")
    assert suite.split("a", "train")[0]["choices"] == ["yes", "no"]


def test_several_references_are_a_column_of_their_own(folder: Path) -> None:
    suite = put(folder, a_csv="input,target,references\nq,x,x|y\n", b_csv="input,target\nq,x\n")
    assert suite.split("a", "train")[0]["references"] == ["x", "y"]
    assert "references" not in suite.split("b", "train").column_names


def test_roles_describe_tables_too(folder: Path) -> None:
    role = {"category": "c", "choices": False, "metric": "rougeL", "role": "held-out"}
    (folder / "roles.json").write_text(json.dumps({"a": role}))
    assert put(folder, a_csv="input,target\nq,x\n").info("a") == TaskInfo(
        "c", "rougeL", "held-out", False
    )
    wrong = {**role, "choices": True, "metric": "accuracy"}
    (folder / "roles.json").write_text(json.dumps({"a": wrong}))
    with pytest.raises(InputError, match=r"no choices but roles\.json says otherwise"):
        open_suite(folder, cache_dir=folder.parent / "cache").splits("a")


def test_an_edited_file_is_read_again(folder: Path) -> None:
    put(folder, a_csv="input,target\nq,old\n").splits("a")
    assert put(folder, a_csv="input,target\nq,newer\n").split("a", "train")["target"][0] == "newer"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.csv is empty; its first line must name the columns"),
        ("input,target\n", r"a\.csv holds no row"),
        ("input,label\nq,x\n", r"a\.csv has no column 'target'"),
        ("text,target\nq,x\n", r"a\.csv has no column 'input'"),
        ("input,target,input\nq,x,q\n", r"a\.csv has two columns 'input'"),
        ("input,target\nq,x\nq,x,y\n", r"a\.csv, line 3: the row has 3 cells but the first line 2"),
        ("input,target\nq\n", r"a\.csv, line 2: the row has 1 cells"),
        ('input,target\nq,"x"y\n', r"a\.csv, line 2: the row that .* is not valid CSV"),
        ('input,target\nq,"x', r"a\.csv, line 2: the row that .* is not valid CSV"),
        ("input,target,split\nq,x,more\n", r"a\.csv, line 2: the field 'split' is 'more'"),
        ("input,target\n,x\n", r"a\.csv, line 2: the column 'input' is empty"),
        (
            "input,target,choices\nq,x,y|z\n",
            r"a\.csv, line 2: the target 'x' is not among the choi",
        ),
        ("input,target,choices\nq,x,[x\n", r"line 2: the column 'choices' is not valid JSON"),
        (
            "input,target,choices\nq,x,x|y\nq,x,\n",
            r"line 3: the field 'choices' is null but the fi",
        ),
        ("input,target,references\nq,x,y\n", r"line 2: the target 'x' is not among the references"),
        ("input,target,references\nq,x,\nq,x,x\n", r"line 3: the field 'references' is a list but"),
    ],
)
def test_a_wrong_table_is_refused(folder: Path, text: str, message: str) -> None:
    suite = put(folder, a_csv=text)
    with pytest.raises(InputError, match=message) as caught:
        validate(suite, ["a"])
    assert len(str(caught.value).splitlines()) == 1


def test_a_wrong_row_of_any_file_is_named(folder: Path) -> None:
    table: Any = pa.table({"input": ["p", "q"], "target": [1, 2]})
    pq.write_table(table, folder / "a.parquet")
    (folder / "b.parquet").write_bytes(b"PAR1 not really")
    (folder / "c.train.jsonl").write_text('{"input": "q"}\n')
    (folder / "d.csv").write_bytes(b"input,target\nq,\xe9\n")
    (folder / "e.train.csv").write_text("input,target,split\nq,x,test\n")
    suite = open_suite(folder, cache_dir=folder.parent / "cache")
    for task, message in {
        "a": r"a\.parquet, row 1: the field 'target' must be a string, not a number",
        "b": r"b\.parquet is not a readable Parquet file",
        "c": r"c\.train\.jsonl, line 1: the field 'target' is missing",
        "d": r"d\.csv is not UTF-8",
        "e": r"e\.train\.csv, line 2: the column 'split' is 'test' but the file is for 'train'",
    }.items():
        with pytest.raises(InputError, match=message):
            suite.splits(task)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a_csv", "a_parquet"), r"a\.csv and a\.parquet both give rows of the task 'a'"),
        (("a_csv", "a_test_csv"), r"both give rows of the task 'a'; .* such as a\.train\.csv"),
        (("a_test_csv", "a_test_jsonl"), r"both give rows of the task 'a'"),
        (("a_csv", "A_csv"), "differ only in upper and lower case"),
        (("mu_csv",), "the name kept for the average"),
    ],
)
def test_names_that_clash_are_refused(folder: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        put(folder, **dict.fromkeys(names, ""))


def test_a_folder_without_tables_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.csv, \.parquet or \.jsonl file"):
        TabularSuite(folder)
