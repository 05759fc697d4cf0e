"""Files as people have them: each shape in each format, and what is refused."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import DOCS, run_page

from polyroute.data.open import open_suite
from polyroute.data.readers.conversations import Turn, examples
from polyroute.data.readers.shapes import OWN, SHAPES, FileRow, recognised
from polyroute.data.suite import Suite, TaskInfo, quiet_datasets, validate
from polyroute.errors import InputError

Rows = list[dict[str, Any]]


def write_delimited(path: Path, rows: Rows, between: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=between, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_saved(path: Path, rows: Rows) -> None:
    with quiet_datasets():
        datasets.Dataset.from_list(rows).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    ".json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    ".jsonl": lambda path, rows: path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    ),
    ".csv": lambda path, rows: write_delimited(path, rows, ","),
    ".tsv": lambda path, rows: write_delimited(path, rows, "\t"),
    ".parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "": write_saved,
}
NESTED = (".json", ".jsonl", ".parquet", "")
"""The formats whose cells may hold lists."""


def put(place: Path, rows: Rows, name: str = "mine", suffix: str = ".json") -> Path:
    path = place / f"{name}{suffix}"
    WRITERS[suffix](path, rows)
    return path


def opened(path: Path) -> Suite:
    return open_suite(path, cache_dir=path.parent / "cache")


def read(path: Path, task: str = "mine", split: str = "train") -> Rows:
    rows: Rows = opened(path).split(task, split).to_list()
    return rows


def record(given: str, target: str, **more: Any) -> dict[str, Any]:
    usual = {"task": "mine", "instruction": "", "input": given, "target": target, "choices": None}
    return {**usual, **more}


def said(role: str, content: str, keys: tuple[str, str] = ("role", "content")) -> dict[str, str]:
    return dict(zip(keys, (role, content), strict=True))


CHOICES = ["bad", "good"]
FLAT: dict[str, tuple[Rows, Rows]] = {
    "Alpaca": (
        [
            {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "not read"},
            {"instruction": "Sing.", "input": "", "output": "La,\nla", "text": "not read"},
        ],
        [record("1, 2", "3", instruction="Add."), record("", "La,\nla", instruction="Sing.")],
    ),
    "prompt and completion": (
        [{"prompt": "Once ", "completion": "upon"}],
        [record("Once ", "upon")],
    ),
    "text and label": (
        [{"text": "Fine.", "label": "good"}, {"text": "Hm.", "label": "bad"}],
        [record("Fine.", "good", choices=CHOICES), record("Hm.", "bad", choices=CHOICES)],
    ),
    "question and answer": (
        [{"question": "Who?", "answer": "me"}],
        [record("Who?", "me")],
    ),
    "input and target": (
        [{"input": "q", "target": "t", "text": "others", "label": "are not read"}],
        [record("q", "t")],
    ),
}
TALK = [said("user", "Hi"), said("assistant", "Yes?")]
MORE = [*TALK, said("user", "Bye"), said("assistant", "Bye!"), said("user", "Still there?")]
LONG = record("Bye", "Bye!", system="Be brief.", history=TALK)
CHAT: dict[str, tuple[Rows, Rows]] = {
    "messages": (
        [{"messages": [said("system", "Be brief."), *MORE]}, {"messages": TALK}],
        [
            record("Hi", "Yes?", system="Be brief.", history=None),
            LONG,
            record("Hi", "Yes?", system=None, history=None),
        ],
    ),
    "ShareGPT": (
        [
            {
                "conversations": [
                    said("system", "Be brief.", ("from", "value")),
                    said("human", "Hi", ("from", "value")),
                    said("gpt", "Yes?", ("from", "value")),
                ]
            }
        ],
        [record("Hi", "Yes?", system="Be brief.")],
    ),
    "prompt and completion": (
        [{"prompt": [said("system", "Be brief."), *MORE[:3]], "completion": MORE[3:4]}],
        [LONG],
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("shape", FLAT)
def test_rows_of_each_shape_are_read_from_each_format(
    tmp_path: Path, shape: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, records = FLAT[shape]
    path = put(tmp_path, rows, suffix=suffix)
    suite = opened(path)
    assert (suite.name, suite.tasks, suite.splits("mine")) == ("mine", ("mine",), ("train",))
    assert suite.split("mine", "train").to_list() == records
    unit = "example" if len(rows) == 1 else "examples"
    assert capsys.readouterr().out == f"reading {path.name} as {shape}: {len(rows)} {unit}\n"


@pytest.mark.parametrize("suffix", NESTED)
@pytest.mark.parametrize("shape", CHAT)
def test_each_turn_of_the_assistant_is_an_example(tmp_path: Path, shape: str, suffix: str) -> None:
    rows, records = CHAT[shape]
    assert read(put(tmp_path, rows, suffix=suffix)) == records


@given(
    st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4),
    st.none() | st.text(min_size=1),
    st.booleans(),
)
def test_the_examples_of_a_conversation_together_say_all_of_it(
    pairs: list[tuple[str, str]], system: str | None, is_open: bool
) -> None:
    first = [] if system is None else [Turn("system", system)]
    turns = [
        turn for ask, answer in pairs for turn in (Turn("user", ask), Turn("assistant", answer))
    ]
    found = list(examples([*first, *turns, *[Turn("user", "?")] * is_open], "x"))
    assert [(each["input"], each["target"]) for each in found] == pairs
    assert {each["system"] for each in found} == {system}
    for number, each in enumerate(found):
        earlier = [said(turn.role, turn.content) for turn in turns[: 2 * number]]
        assert (each["history"] or []) == earlier


@given(st.sets(st.sampled_from(sorted(set().union(*(s.needs | s.unless for s in SHAPES))))))
def test_a_row_has_one_shape_or_is_refused(columns: set[str]) -> None:
    row = FileRow(dict.fromkeys(columns, "x"), "a.csv, line 2", Path("a.csv"), {})
    fitting = [shape for shape in SHAPES if shape.fits(columns)]
    if OWN in fitting:
        assert recognised(row) is OWN
    elif len(fitting) == 1:
        assert recognised(row) is fitting[0]
    else:
        with pytest.raises(InputError, match=r"a\.csv"):
            recognised(row)


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_any_text_comes_through_json_parquet_and_csv(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    rows = [{"prompt": text, "completion": text} for text in texts]
    for suffix in (".json", ".jsonl", ".parquet", ".tsv"):
        found = read(put(tmp_path_factory.mktemp("texts"), rows, suffix=suffix))
        assert [row["target"] for row in found] == [row["input"] for row in found] == texts


def test_alpaca_may_lack_inputs_and_have_empty_answers(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "", "system": "s"},
        {"instruction": "b", "input": None, "output": "c"},
    ]
    found = read(put(tmp_path, rows))
    assert [(row["input"], row["target"], row["system"]) for row in found] == [
        ("", "", "s"),
        ("", "c", None),
    ]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_divides_the_rows_among_tasks_and_another_among_splits(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [("a", "train"), ("b", "test"), ("a", "validation"), ("b", "train"), ("b", "train")]
    rows = [
        {"instruction": "i", "output": str(n), "task": task, "split": split}
        for n, (task, split) in enumerate(wanted)
    ]
    suite = opened(put(tmp_path, rows, suffix=suffix))
    assert suite.tasks == ("a", "b")
    assert (suite.splits("a"), suite.splits("b")) == (("train", "validation"), ("train", "test"))
    assert suite.split("b", "train")["target"][:] == ["3", "4"]
    assert suite.split("b", "train")["task"][:] == ["b", "b"]
    line = f"reading mine{suffix} as Alpaca: 5 examples of 2 tasks\n"
    assert capsys.readouterr().out == line


def test_each_task_of_a_file_has_its_own_labels(tmp_path: Path) -> None:
    pairs = [("a", "x"), ("a", "y"), ("b", "1st"), ("b", "2nd"), ("c", "only")]
    rows = [{"text": "t", "label": label, "task": task} for task, label in pairs]
    suite = opened(put(tmp_path, rows))
    found = {task: suite.split(task, "train")[0]["choices"] for task in suite.tasks}
    assert found == {"a": ["x", "y"], "b": ["1st", "2nd"], "c": None}
    assert suite.info("a") == TaskInfo("", "accuracy", None, True)


@pytest.mark.parametrize(("classes", "choices"), [(100, 100), (101, None)])
def test_of_very_many_labels_one_is_written(
    tmp_path: Path, classes: int, choices: int | None
) -> None:
    rows = [{"text": "t", "label": f"class {n}"} for n in range(classes)]
    found = read(put(tmp_path, rows))[0]["choices"]
    assert (found and len(found)) == choices


def labelled(numbers: list[int]) -> datasets.Dataset:
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = {"text": ["t"] * len(numbers), "label": numbers}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def save(rows: Any, path: Path) -> Path:
    with quiet_datasets():
        if path.suffix:
            rows.to_parquet(path)
        else:
            rows.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_numbers_of_classes_are_read_by_their_names(tmp_path: Path, suffix: str) -> None:
    path = save(labelled([1, 0]), tmp_path / f"mine{suffix}")
    assert [(row["target"], row["choices"]) for row in read(path)] == [
        ("yes", ["no", "yes"]),
        ("no", ["no", "yes"]),
    ]


def test_a_column_of_texts_names_numbers_of_classes(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": n, "label_text": text} for n, text in enumerate(CHOICES)]
    found = read(put(tmp_path, rows))
    assert [(row["target"], row["choices"]) for row in found] == [(t, CHOICES) for t in CHOICES]


def test_a_dictionary_of_saved_splits_is_one_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = datasets.DatasetDict({"train": labelled([1, 0, 0]), "test": labelled([1])})
    suite = opened(save(whole, tmp_path / "saved"))
    assert (suite.name, suite.tasks, suite.splits("saved")) == (
        "saved", ("saved",), ("train", "test"),
    )  # fmt: skip
    assert capsys.readouterr().out == "reading saved as text and label: 4 examples\n"


def test_a_folder_may_hold_files_and_saved_data_of_all_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    put(folder, FLAT["Alpaca"][0], "a.train", ".json")
    put(folder, FLAT["Alpaca"][0][:1], "a.test", ".tsv")
    put(folder, FLAT["question and answer"][0], "q", ".jsonl")
    put(folder, FLAT["input and target"][0], "own", ".csv")
    save(labelled([1, 0]), folder / "saved")
    (folder / "config.json").write_text('{"what": "settings, not rows"}')
    role = {"category": "", "choices": True, "metric": "accuracy", "role": "held-out"}
    (folder / "roles.json").write_text(json.dumps({"saved": role}))
    suite = opened(folder)
    assert suite.tasks == ("a", "own", "q", "saved")
    assert suite.splits("a") == ("train", "test")
    assert suite.info("saved").role == "held-out"
    validate(suite, suite.tasks)
    assert capsys.readouterr().out.splitlines() == [
        "ignored in several: config.json",
        "reading a.test.tsv, a.train.json as Alpaca: 3 examples",
        "reading q.jsonl as question and answer: 1 example",
        "reading saved as text and label: 2 examples",
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("shape", FLAT)
def test_files_that_are_called_after_splits_are_one_task(
    tmp_path: Path, shape: str, suffix: str
) -> None:
    folder = tmp_path / "poems"
    folder.mkdir()
    for split in ("train", "test"):
        put(folder, FLAT[shape][0], split, suffix)
    suite = opened(folder)
    assert (suite.tasks, suite.splits("poems")) == (("poems",), ("train", "test"))
    assert opened(folder / f"test{suffix}").splits("poems") == ("test",)


def test_a_json_file_may_hold_an_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    WRITERS[".jsonl"](path, FLAT["Alpaca"][0])
    assert read(path) == FLAT["Alpaca"][1]


def test_a_saved_data_set_is_read_again_after_a_change(tmp_path: Path) -> None:
    path = save(labelled([1, 0]), tmp_path / "mine")
    assert len(read(path)) == 2
    assert len(read(save(labelled([1, 0, 1]), path))) == 3


def ask(**cells: Any) -> dict[str, Any]:
    return {"instruction": "i", "output": "o", **cells}


def talk(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


LABEL = {"text": "t", "label": "good"}
ASKED = {"question": "Who?", "answer": "me"}
PART = {"type": "text", "text": "Hi"}
WRONG: list[tuple[Rows, str]] = [
    ([ask(), ask(output=None)], "row 2: the column 'output' is null; write a text or remove"),
    ([ask(), {"instruction": "i"}], "row 2: the column 'output' is missing; add it"),
    ([ask(output=["a"])], "row 1: the column 'output' is a list, not text; write one text"),
    ([ask(output={"a": "b"})], "row 1: the column 'output' is an object, not text"),
    ([ask(output=1.5)], "row 1: the column 'output' is a number, not text; .* in quotes"),
    ([ask(output=True)], "row 1: the column 'output' is a boolean, .*labels: {false: \"?'?no"),
    ([ask(input=3)], "row 1: the column 'input' is a number, not text"),
    ([ask(instruction=["a"])], "row 1: the column 'instruction' is a list"),
    ([ask(history=[["a", "b"]])], "row 1: the column 'history' holds earlier turns"),
    ([ask(task="a"), ask(task=3)], "row 2: the column 'task' is a number"),
    ([ask(task="a"), ask()], "row 2: the column 'task' is missing"),
    ([ask(), ask(task="a")], "row 2: the row has a column 'task' but the first has none"),
    ([ask(split="more")], "row 1: the field 'split' is 'more'"),
    ([ask(split=["train"])], "row 1: the field 'split' must be a string, not a list"),
    ([ask(instruction="")], "row 1: the column 'instruction' is empty; fill it"),
    ([ask(), "a"], "row 2: a row must be a JSON object, not a string"),  # type: ignore[list-item]
    (
        [LABEL, {**LABEL, "label": 1}],
        "row 2: the column 'label' is the number 1, .*YAML.*name of 0",
    ),
    ([{**LABEL, "label": 0.5}], "row 1: the column 'label' is the number 0.5, which has no name"),
    ([{**LABEL, "label": False}], "row 1: the column 'label' is a boolean"),
    ([{**LABEL, "label": None}], "row 1: the column 'label' is null"),
    ([{"prompt": "a", "completion": TALK}], "row 1: the column 'completion' is a list, not text"),
    ([{"question": "q", "answer": ["a"]}], "row 1: the column 'answer' is a list"),
    (
        [{"question": "q", "answers": {"text": []}}],
        "row 1: the column 'answers' is an object, as in",
    ),
    ([{"question": "q", "answer": "a", "context": "c"}], r"no known shape; .*{context} {question}"),
    ([{"response": "r"}], r"mine\.json has the columns 'response', which fit no known shape"),
    ([{"instruction": "i", "input": "x"}, ask()], "row 1: the field 'target' is missing"),
    ([{"messages": "Hi"}], "row 1: the column 'messages' is a string, not a list of turns"),
    ([talk("Hi")], "row 1: the column 'messages', turn 1 is a string"),
    ([talk({"text": "Hi"})], "turn 1 has the fields 'text'; give it 'role' and 'content'"),
    ([talk(said("usr", "Hi"))], "turn 1: the role 'usr' is not known; did you mean 'user'"),
    ([talk(said("tool", "Hi"))], "turn 1 is the tool's, and calls of tools are not read"),
    (
        [talk(TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]})],
        "row 1: the column 'messages', turn 2 has 'tool_calls', and calls of tools are not read",
    ),
    (
        [{"conversations": [{"from": "function_call", "value": "{}"}]}],
        "the column 'conversations', turn 1 is the function_call's, and calls of tools",
    ),
    ([{**talk(*TALK), "tools": [{"name": "f"}]}], "row 1: the column 'tools' belongs to the conv"),
    ([{**talk(*TALK), "images": ["a.png"]}], "row 1: the column 'images' belongs to the conver"),
    ([talk({"role": "user", "content": ["Hi"]})], "content has a part 1 of type 'a string'"),
    (
        [talk(*TALK), talk({"role": "user", "content": [PART, {**PART, "type": "image_url"}]})],
        "row 2: the column 'messages', turn 1: the content has a part 2 of type 'image_url', and",
    ),
    (
        [{"prompt": "p", "completion": "c", "label": False}],
        "row 1: the column 'label' says whether the completion is wanted",
    ),
    ([talk({"role": "user", "content": None})], "turn 1: the content is null"),
    ([talk()], "row 1: the column 'messages' has no answer of the assistant"),
    ([talk(TALK[0])], "row 1: the column 'messages' has no answer of the assistant"),
    ([talk(TALK[1])], "turn 1 is the assistant's, but the user is next"),
    ([talk(*TALK, TALK[1])], "turn 3 is the assistant's, but the user is next"),
    ([talk(*TALK, said("system", "s"))], "turn 3 is the system's, but the user is next"),
    ([{"input": "q", "target": "t", "history": [said("system", "s")]}], "turn 1 is 'system' but"),
    ([{"input": "q", "target": "t", "history": [{"role": "user"}]}], "turn 1 must be an object"),
    ([{"input": "q", "target": "t", "history": "x"}], "'history' must be a list of turns"),
    ([{"input": "q", "target": "t", "history": 0}], "'history' must be a list of turns"),
    ([{"input": "q", "target": "t", "history": "[x"}], "the column 'history' is not valid JSON"),
    (
        [{"input": "q", "target": "t", "history": TALK[1:]}],
        "row 1: the field 'history': turn 1 is the assistant's; begin with the user's turn",
    ),
    (
        [{"input": "q", "target": "t", "history": [*TALK, TALK[1]]}],
        "'history': turn 3 is the assistant's, and so is the one before",
    ),
    (
        [{"input": "q", "target": "t", "history": MORE}],
        "'history': the last turn is the user's, as the input is",
    ),
    (
        [{"input": "q", "target": "t", "instruction": 0}],
        "row 1: the column 'instruction' is a number, not text",
    ),
    (
        [{"input": "q", "target": "t"}, {"input": "q", "target": "t", "instruction": False}],
        "row 2: the column 'instruction' is a boolean, not text",
    ),
    ([ask(split=0)], "row 1: the field 'split' must be a string, not a number"),
    (
        [ASKED, {**ASKED, "context": "c"}],
        "row 2: the row has 'context', which the first row lacks, and with that it is not question",
    ),
    ([ASKED, ASKED, {**ASKED, "choices": CHOICES}], "row 3: the row has 'choices', which the"),
    ([LABEL, {**LABEL, "label_text": "good"}], "row 2: the row has 'label_text', which the first"),
    ([ask(), ask(messages=TALK)], "row 2: the row has 'messages', which the first row lacks"),
    (
        [ask(), ask(chosen="a", rejected="b")],
        "row 2: the row has 'chosen', 'rejected', which the first",
    ),
    (
        [talk(TALK[0], {**TALK[1], "reasoning_content": "Hm."})],
        "row 1: .*turn 2 has 'reasoning_content', which is not read; write it into the content",
    ),
    ([talk(TALK[0], {**TALK[1], "weight": 0.5})], "turn 2: the weight is 0.5; give 1"),
    ([{"input": "q", "target": "t", "system": 1}], "the column 'system' is a number"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, rows: Rows, message: str) -> None:
    path = put(tmp_path, rows)
    with pytest.raises(InputError, match=message) as caught:
        validate(suite := opened(path), suite.tasks)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1", r"a\.json is not valid JSON .*write a list of objects"),
        ("a.json", '{"a": 1,\n "b": 2}', r"a\.json holds an object, not a list of rows"),
        ("a.json", "", r"a\.json holds no row"),
        ("a.json", "[]", r"a\.json holds no row"),
        ("a.jsonl", "", r"a\.jsonl holds no row"),
        (
            "a.jsonl",
            '{"prompt": "p", "completion": "c"}\n\n{"prompt": 1}',
            "line 3: the column 'pr",
        ),
        ("a.tsv", "text\tlabel\nt\tx\ty\n", "line 2: the row has 3 cells .* holds a tab"),
        ("a.csv", "text,label\nt,x\nt,2\n", r"a\.csv, line 3: the column 'label' is the number 2"),
        ("a.csv", "prompt,completion,prompt\nt,x,t\n", r"a\.csv has two columns 'prompt'"),
        ("a.csv", "task,prompt,completion\nmu,x,t\n", "the name kept for the average"),
        ("a.csv", "task,prompt,completion\n../b,x,t\n", "which cannot name a folder of results"),
        ("a.json", b'["\xe9"]', r"a\.json is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        validate(suite := opened(tmp_path / name), suite.tasks)


def test_a_later_row_may_have_more_columns_of_the_same_shape(tmp_path: Path) -> None:
    rows = [ask(), ask(input="x"), ask(note="others are not read"), ask(system="Be brief.")]
    assert len(read(put(tmp_path, rows))) == 4


@pytest.mark.parametrize("suffix", NESTED)
def test_a_turn_of_weight_0_is_only_context(tmp_path: Path, suffix: str) -> None:
    turns = [{**turn, "weight": None} for turn in MORE]
    turns[1]["weight"], turns[3]["weight"] = 0, 1  # type: ignore[assignment]
    skipped = [TALK[0], {**TALK[1], "weight": 0, "reasoning_content": None}]
    found = read(put(tmp_path, [talk(*turns), talk(*skipped)], suffix=suffix))
    assert [(each["input"], each["target"], each["history"]) for each in found] == [
        ("Bye", "Bye!", TALK)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json"])
def test_a_history_may_be_written_as_json(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"input": "Bye", "target": "Bye!", "history": json.dumps(TALK)},
        {"input": "Hi", "target": "Yes?", "history": ""},
        {"input": "Hi", "target": "Yes?", "history": "[]"},
    ]
    found = read(put(tmp_path, rows, suffix=suffix))
    assert [each["history"] for each in found] == [TALK, None, None]


def test_a_damaged_or_foreign_saved_data_set_is_refused(tmp_path: Path) -> None:
    path = save(labelled([1]), tmp_path / "mine")
    (path / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"is not a readable data set .* save_to_disk"):
        opened(path).splits("mine")
    other = save(datasets.DatasetDict({"more": labelled([1])}), tmp_path / "other")
    with pytest.raises(InputError, match="has the splits more; save it again with splits"):
        opened(other)


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    path = save(labelled([0, -1]), tmp_path / "mine")
    with pytest.raises(InputError, match="row 2: the column 'label' is -1, which names no class"):
        opened(path).splits("mine")


def test_files_of_one_task_have_one_shape(tmp_path: Path) -> None:
    put(tmp_path, FLAT["Alpaca"][0], "a.train")
    put(tmp_path, FLAT["question and answer"][0], "a.test")
    with pytest.raises(InputError, match=r"a\.train\.json has other columns than .*a\.test\.json"):
        opened(tmp_path).splits("a")


def test_two_files_that_name_the_same_task_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path, [ask(task="x")], name)
    with pytest.raises(InputError, match=r"a\.json and .*b\.json both give rows of the task 'x'"):
        opened(tmp_path)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    ("rows", "message", "target"),
    [
        ([{**LABEL, "question": "q", "answer": "a"}], "as text and label or as question", "good"),
        ([ask(prompt="p", completion="c")], "as Alpaca or as prompt and completion", "o"),
        ([{"question": "q", "answer": "a", "context": "c"}], "fit no known shape", "a"),
    ],
)
def test_the_yaml_of_a_refusal_decides(
    tmp_path: Path, rows: Rows, message: str, target: str, suffix: str
) -> None:
    rows = [{"input": "x", **row} if "output" in row else row for row in rows]
    path = put(tmp_path, rows, suffix=suffix)
    with pytest.raises(InputError, match=message) as caught:
        opened(path).splits("mine")
    (tmp_path / "mine.yaml").write_text(lines(str(caught.value)))
    assert read(tmp_path / "mine.yaml")[0]["target"] == target


PAIR = {"chosen": "good", "rejected": "bad"}
PAIRS = {"chosen": [said("assistant", "good")], "rejected": [said("assistant", "bad")]}
WHOLE = {name: [said("user", "q"), *answer] for name, answer in PAIRS.items()}


@pytest.mark.parametrize(
    ("row", "suffixes"),
    [
        ({"prompt": "q", **PAIR}, WRITERS),
        ({"question": "q", **PAIR}, WRITERS),
        ({"instruction": "i", "input": "q", **PAIR}, WRITERS),
        ({"prompt": [said("user", "q")], **PAIRS}, NESTED),
        ({"prompt": "q", **WHOLE}, NESTED),
        ({"messages": WHOLE["chosen"], **WHOLE}, NESTED),
    ],
)
def test_preferences_are_refused_and_the_yaml_takes_the_chosen_answers(
    tmp_path: Path, row: dict[str, Any], suffixes: Any
) -> None:
    for suffix in suffixes:
        folder = tmp_path / suffix.strip(".")
        folder.mkdir(exist_ok=True)
        path = put(folder, [row], suffix=suffix)
        with pytest.raises(InputError, match="'chosen' and 'rejected', and preferences") as caught:
            opened(path).splits("mine")
        (folder / "mine.yaml").write_text(lines(str(caught.value)))
        (found,) = read(folder / "mine.yaml")
        assert (found["input"], found["target"]) == ("q", "good")


def test_of_a_prompt_that_is_a_conversation_only_the_chosen_turns_are_targets(
    tmp_path: Path,
) -> None:
    put(tmp_path, [{"prompt": MORE[:3], "chosen": MORE[3:4], "rejected": MORE[3:4]}])
    entry = {"path": "json", "data_files": "mine.json"}
    columns = {"messages": ["prompt", "chosen"]}
    content = {"tasks": {"mine": {**entry, "columns": columns}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert read(tmp_path / "mine.yaml") == [record("Bye", "Bye!", history=TALK)]


@pytest.mark.parametrize("suffix", NESTED)
def test_parts_of_text_are_one_text(tmp_path: Path, suffix: str) -> None:
    asked = {"role": "user", "content": [PART, {"type": "text", "text": " there"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]}
    assert read(put(tmp_path, [talk(asked, answer)], suffix=suffix)) == [record("Hi there", "Yes?")]


def lines(message: str) -> str:
    """The YAML in a message: from its first brace to the brace that closes it."""
    start = message.index("{tasks:")
    for end in range(start + 1, len(message) + 1):
        if message[start:end].count("{") == message[start:end].count("}"):
            return message[start:end]
    raise AssertionError(message)


@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".parquet", ""])
def test_the_yaml_of_a_refusal_names_the_classes(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path, [{"text": "t", "label": 1}, {"text": "u", "label": 0}], suffix=suffix)
    with pytest.raises(InputError, match="name the classes in a YAML file") as caught:
        opened(path).splits("mine")
    content = yaml.safe_load(lines(str(caught.value)))
    content["tasks"]["mine"]["columns"]["labels"] = ["no", "yes"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert [row["target"] for row in read(tmp_path / "mine.yaml")] == ["yes", "no"]


@pytest.mark.parametrize("shape", ["messages", "ShareGPT"])
def test_a_yaml_file_may_name_a_column_of_conversations(tmp_path: Path, shape: str) -> None:
    rows, records = CHAT[shape]
    put(tmp_path, rows)
    columns = {"messages": next(iter(rows[0]))}
    entry = {"path": "json", "data_files": "mine.json", "columns": columns}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": entry}}))
    assert read(tmp_path / "mine.yaml") == records


def test_a_yaml_file_reads_the_splits_of_saved_data(tmp_path: Path) -> None:
    whole = datasets.DatasetDict({"train": labelled([1, 0, 0]), "test": labelled([1])})
    save(whole, tmp_path / "saved")
    entry: dict[str, Any] = {"path": "saved", "columns": {"input": "text", "target": "label"}}

    def suite(**more: Any) -> Suite:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": entry | more}}))
        return opened(tmp_path / "mine.yaml")

    assert suite().splits("mine") == ("train", "test")
    assert suite(split={"validation": "test"}).splits("mine") == ("validation",)
    with pytest.raises(InputError, match=re.escape("has no split 'tests'; did you mean 'test'")):
        suite(split={"test": "tests"}).splits("mine")


DATA_PAGE = (DOCS / "data.md").read_text(encoding="utf-8")


def test_the_file_that_the_page_shows_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    section = DATA_PAGE.split("## Files as you have them")[1].split("## Tables")[0]
    (tmp_path / "section.md").write_text(section, encoding="utf-8")
    run_page(tmp_path / "section.md")
    (promised,) = re.findall(r"first line of the output is `([^`]+)`", section)
    assert capsys.readouterr().out.splitlines()[0] == promised
    assert (tmp_path / "runs" / "alpaca" / "metrics.json").is_file()


def test_the_page_lists_every_shape_with_its_columns() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", DATA_PAGE, flags=re.MULTILINE)
    for shape in SHAPES:
        lines = [columns for name, columns in rows if name == shape.name]
        assert any(shape.needs <= set(re.findall(r"`(\w+)`", columns)) for columns in lines)


def test_a_yaml_file_reads_saved_data_again_after_a_change(tmp_path: Path) -> None:
    entry = {"path": "saved", "columns": {"input": "text", "target": "label"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": entry}}))
    for number, name in ((1, "yes"), (0, "no")):
        save(labelled([number]), tmp_path / "saved")
        assert read(tmp_path / "mine.yaml")[0]["target"] == name
