"""Files that are nearly right: what is read all the same, and what is refused in one sentence."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from polyroute.data.open import open_suite
from polyroute.data.suite import Suite, quiet_datasets, validate
from polyroute.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    return path


def opened(path: Path) -> Suite:
    return open_suite(path, cache_dir=path.parents[1] / "cache")


def put(folder: Path, **texts: str) -> Suite:
    """Write files, `a_train_csv` for `a.train.csv`, and open the folder."""
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return opened(folder)


def refusal(suite: Suite) -> str:
    with pytest.raises(InputError) as caught:
        validate(suite, suite.tasks)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


TWICE = '{"input": "q", "target": "t", "target": "u"}'
LONG = '{"input": "q", "target": ' + "9" * 5000 + "}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # empty labels
        ("a.csv", "text,label\na,pos\nb,\nc,neg\n", "line 3: the column 'label' is empty; write a"),
        ("a.tsv", "text\tlabel_text\na\tpos\nb\t \n", "line 3: the column 'label_text' is empty"),
        ("a.csv", "input,target,choices\nq,x,x|\n", "line 2: the field 'choices' lists an empty"),
        ("a.csv", 'input,target,choices\nq,x,"[""x"", ""x ""]"\n', "lists 'x' and 'x ', which dif"),
        # numbers as labels
        ("a.csv", "text,label\na,1.0\nb,0.0\n", "line 2: the column 'label' is the number 1.0, wh"),
        ("a.csv", "text,label\na,-1\nb,1\n", "line 2: the column 'label' is the number -1, which"),
        # labels that look alike
        (
            "a.csv",
            "text,label\na,pos\nb,neg\nc,pos \n",
            "line 4: the label 'pos ' and the label 'pos' of earlier rows differ only in white spa",
        ),
        # nothing is asked
        ("a.csv", "text,label\n,neg\n", "line 2: the column 'text' is empty; fill it or remove"),
        ("a.csv", "question,answer\n,x\n", "line 2: the column 'question' is empty; fill it"),
        ("a.csv", "input,target\n,x\n", "line 2: the column 'input' is empty; fill it or remove"),
        (
            "a.csv",
            "instruction,input,target\n,,x\n",
            "line 2: the columns 'instruction' and 'input' are both empty; fill one of them or rem",
        ),
        (
            "a.json",
            '[{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]'
            "}]",
            "row 1: in the column 'messages', a turn of the user is empty; fill it",
        ),
        # other separators
        ("a.csv", "text;label\na, b;pos\n", "is separated by ';': save it with commas"),
        ("a.csv", "text\tlabel\na\tpos\n", "by tabs: save it with commas or rename it to .tsv"),
        ("a.tsv", "text,label\na,pos\n", "by commas: save it with tabs or rename it to .csv"),
        ("a.csv", "sep=,\ntext,label\na,pos\n", "begins with the line 'sep=', which only Excel"),
        ("a.csv", "sep=;\ntext;label\na;pos\n", "begins with the line 'sep=;', which only Excel"),
        # an open quote
        ("a.csv", 'input,target\nq,x\n"q,x\nq,x\nq,x\n', "line 3: the row that begins here is not"),
        # JSON that holds no rows
        ("a.json", "null", "a.json holds null, not a list of rows; write a list of objects, one"),
        ("a.json", '"hello"', "a.json holds a string, not a list of rows; write a list"),
        ("a.json", '{"data": [\n{}\n]}', "a.json holds an object, not a list of rows; write a"),
        ("a.jsonl", '[{"input": "q",\n"target": "t"}]', "one JSON list, .* rename it to a.json"),
        ("a.jsonl", '[{"input": "q", "target": "t"}]\n', "one JSON list, .* rename it to a.json"),
        ("a.jsonl", '["q"]\n["r"]\n', "line 1: a record must be a JSON object, not a list"),
        # numbers of many digits
        ("a.json", f"[{LONG}]", "a.json: a number has too many digits to be read; write it as te"),
        ("a.jsonl", LONG, "line 1: a number has too many digits to be read"),
        # keys that are there twice
        ("a.jsonl", TWICE, "line 1: an object has the key 'target' twice; remove one of them"),
        ("a.json", f'[{{"x": 1}}, {TWICE}]', "row 2: an object has the key 'target' twice"),
        ("a.json", f'[{{"x": [{TWICE}]}}]', "row 1: an object has the key 'target' twice"),
        ("a.json", f"[{TWICE}, {LONG}]", "a.json: an object has the key 'target' twice"),
    ],
)
def test_what_is_nearly_right_is_refused_by_what_is_wrong(
    folder: Path, name: str, text: str, message: str
) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    found = refusal(opened(folder / name))
    assert re.search(message, found), found
    assert "set_int_max_str_digits" not in found


def test_a_task_that_roles_name_twice_is_refused(folder: Path) -> None:
    (folder / "roles.json").write_text('{"a": {}, "a": {}}')
    with pytest.raises(InputError, match=r"roles\.json: an object has the key 'a' twice"):
        put(folder, a_csv="input,target\nq,x\n")


def test_tasks_that_differ_in_white_space_alone_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"'A' of .* and 'A ' of .* differ only in white space"):
        put(folder, a_csv="task,input,target\nA,q,x\nA ,q,x\n")
    with pytest.raises(InputError, match="called ' ', which cannot name a folder"):
        put(folder, a_csv="task,input,target\n ,q,x\n")


@pytest.mark.parametrize("name", ["dev", "valid", "val", "eval", "validation", "Dev"])
def test_dev_and_its_like_are_the_validation_split(folder: Path, name: str) -> None:
    text = "input,target\nq,x\n"
    texts = {"train_csv": text, f"{name}_csv": text, "b_train_csv": text, f"b_{name}_csv": text}
    texts["c_csv"] = f"input,target,split\nq,x,train\nq,x,{name}\n"
    suite = put(folder, **texts)
    assert suite.tasks == ("b", "c", "mine")
    assert {suite.splits(task) for task in suite.tasks} == {("train", "validation")}


def test_two_files_of_the_validation_split_are_refused(folder: Path) -> None:
    text = "input,target\nq,x\n"
    message = r"dev\.csv and valid\.csv both give rows of the task 'mine' in the split 'validation'"
    with pytest.raises(InputError, match=message):
        put(folder, train_csv=text, dev_csv=text, valid_csv=text)


def saved(folder: Path, *splits: str) -> None:
    rows = datasets.Dataset.from_dict({"input": ["q"], "target": ["x"]})
    with quiet_datasets():
        datasets.DatasetDict(dict.fromkeys(splits, rows)).save_to_disk(str(folder))


def test_dev_is_the_validation_split_of_saved_data_too(folder: Path) -> None:
    saved(folder / "a", "train", "dev")
    assert opened(folder / "a").splits("a") == ("train", "validation")
    entry = {"path": "a", "columns": {"input": "input", "target": "target"}}
    tasks = {"y": {**entry, "split": {"test": "dev"}}}
    (folder / "b.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    assert opened(folder / "b.yaml").splits("y") == ("test",)
    saved(folder / "b", "dev", "validation")
    with pytest.raises(InputError, match="'dev' and 'validation', which both mean validation"):
        opened(folder / "b")


def test_labels_of_whole_numbers_are_named_however_they_are_written(folder: Path) -> None:
    suite = put(folder, a_csv="text,label\na,1.0\nb,0.0\n")
    shown = refusal(suite).split("instead: ")[1]
    content: Any = yaml.safe_load(shown)
    content["tasks"]["a"]["columns"]["labels"] = ["no", "yes"]
    (folder / "a.yaml").write_text(yaml.safe_dump(content))
    assert opened(folder / "a.yaml").split("a", "train")["target"][:] == ["yes", "no"]


def test_what_is_ignored_in_a_folder_is_said_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "more").mkdir()
    for name in ("two.xlsx", "three.csv.gz", "README.md", "LICENSE", ".hidden", "notes.md"):
        (folder / name).touch()
    (folder / "roles.json").write_text("{}")
    record = {"instruction": "", "input": "q", "target": "x", "choices": None, "split": "train"}
    for name, text in (("a.jsonl", json.dumps(record)), ("b.csv", "input,target\nq,x\n")):
        (folder / name).write_text(text)
        suite = opened(folder)  # first as a folder of records, then as one of tables
        validate(suite, suite.tasks)
        line = "ignored in mine: more/, three.csv.gz, two.xlsx\n"
        assert capsys.readouterr().out == line
    for number in range(9):
        (folder / f"x{number}.txt").touch()
    opened(folder)
    assert capsys.readouterr().out.endswith("x0.txt, x1.txt, x2.txt, x3.txt, x4.txt and 4 more\n")


def test_a_cell_may_be_as_long_as_a_book(folder: Path) -> None:
    suite = put(folder, a_csv=f"input,target\nq,{'x' * 200_000}\n")
    assert len(suite.split("a", "train")[0]["target"]) == 200_000


def test_empty_answers_are_counted_in_one_warning_from_the_cache_too(folder: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    texts = {
        "a_csv": "input,target,split\nq,,train\nr, ,test\ns,x,train\n",
        "b_json": json.dumps([{"instruction": "i", "output": ""}]),
        "c_json": json.dumps([{"messages": talk}]),
        "d_csv": "input,target\nq,x\n",
    }
    for _ in range(2):
        suite = put(folder, **texts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            validate(suite, suite.tasks, needs=["train"])
        assert [str(each.message) for each in caught] == [
            "4 targets are empty, of the tasks 'a' (2), 'b' (1), 'c' (1), and the model learns to "
            "answer nothing there: remove these rows if an answer is missing"
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate(suite, ["d"])
