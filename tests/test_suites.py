import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from polyroute.data.metrics import text_metric
from polyroute.data.open import open_suite
from polyroute.data.readers.jsonl import JsonlSuite
from polyroute.data.suite import (
    METRICS,
    RESERVED_TASK,
    SPLITS,
    Suite,
    TaskInfo,
    check_tasks,
    held_out_tasks,
    prompt,
    training_tasks,
    validate,
)
from polyroute.errors import InputError
from polyroute.routes.table import MU

SHARED = Path(os.environ.get("POLYROUTE_SHARED", Path(__file__).parents[2] / "shared"))
COLUMNS = ["task", "instruction", "input", "target", "choices"]
ROLE = {"category": "logic", "choices": True, "metric": "accuracy", "role": "held-out"}
A_METRIC = "'metric' must be one of accuracy, exact_match, strict_match, rougeL"


def record(**changes: Any) -> dict[str, Any]:
    usual = {"instruction": "Is it so?", "input": "2 > 1", "target": "yes"}
    return {**usual, "choices": ["yes", "no"], "split": "train", **changes}


def lines(*records: Any) -> str:
    return "".join(json.dumps(each) + "\n" for each in records)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in record().items() if key != name}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "logic"
    path.mkdir()
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def put(folder: Path, cache: Path, **texts: str) -> Suite:
    """Write the task files, one an argument, and open the suite."""
    for task, text in texts.items():
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return open_suite(folder, cache_dir=cache)


def put_roles(folder: Path, roles: Any) -> None:
    (folder / "roles.json").write_text(json.dumps(roles), encoding="utf-8")


def test_a_suite_has_the_name_of_its_folder_and_sorted_tasks(folder: Path, cache: Path) -> None:
    suite = put(folder, cache, b=lines(record()), a=lines(record()), c=lines(record()))
    (folder / "._a.jsonl").write_bytes(b"\x00\xff")  # macOS leaves such files
    (folder / "notes.txt").touch()
    suite = open_suite(folder, cache_dir=cache)
    assert (suite.name, suite.tasks) == ("logic", ("a", "b", "c"))


def test_a_split_has_its_records_in_file_order(folder: Path, cache: Path) -> None:
    order = ["test", "train", "validation", "train", "test", "train"]
    rows = [record(input=str(i), split=split, extra=i) for i, split in enumerate(order)]
    suite = put(folder, cache, a=lines(*rows))
    assert suite.splits("a") == SPLITS
    for split in SPLITS:
        data = suite.split("a", split)
        assert data.column_names == COLUMNS
        assert list(data["input"]) == [row["input"] for row in rows if row["split"] == split]


def test_a_row_has_the_values_of_its_record(folder: Path, cache: Path) -> None:
    text = "U+2028 \u2028, a return \r, \u00e4 and \U0001f40d"
    row = record(instruction=text, target="no", choices=["yes", "no", "?"])
    free = record(input="", target="", choices=None, split="test")
    raw = json.dumps(row, ensure_ascii=False) + "\r\n"
    suite = put(folder, cache, a="\ufeff" + raw + "\n", b="\n" + lines(free))
    expected = {name: {"task": "a", **row}[name] for name in COLUMNS}
    assert suite.split("a", "train")[0] == expected
    assert suite.split("b", "test")[0] == {name: {"task": "b", **free}[name] for name in COLUMNS}


def test_the_rows_are_memory_mapped_from_the_cache(folder: Path, cache: Path) -> None:
    data = put(folder, cache, a=lines(record())).split("a", "train")
    assert [Path(file["filename"]).is_relative_to(cache) for file in data.cache_files] == [True]


@pytest.mark.parametrize("text", ["new", "longer"])
def test_an_edited_file_is_read_again_whatever_its_time(
    folder: Path, cache: Path, text: str
) -> None:
    suite = put(folder, cache, a=lines(record(input="old")))
    assert suite.split("a", "train")["input"][0] == "old"
    path = folder / "a.jsonl"
    stat = path.stat()
    path.write_text(lines(record(input=text)), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert suite.split("a", "train")["input"][0] == "old"
    assert open_suite(folder, cache_dir=cache).split("a", "train")["input"][0] == text


def test_the_table_of_an_unchanged_file_is_used_again(folder: Path, cache: Path) -> None:
    first = put(folder, cache, a=lines(record(input="old"))).split("a", "train")
    (written,) = (Path(file["filename"]) for file in first.cache_files)
    time = written.stat().st_mtime_ns
    os.utime(folder / "a.jsonl", ns=(1, 1))  # a copy or a checkout has another time
    second = open_suite(folder, cache_dir=cache).split("a", "train")
    assert second.cache_files == first.cache_files
    assert written.stat().st_mtime_ns == time
    assert second.to_list() == first.to_list()


def test_a_file_found_wrong_is_checked_again(folder: Path, cache: Path) -> None:
    suite = put(folder, cache, a=lines(record(), without("input")))
    for _ in range(2):
        with pytest.raises(InputError, match="line 2"):
            suite.split("a", "train")


def test_files_of_the_same_name_in_two_folders_do_not_share_a_table(
    tmp_path: Path, cache: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "a.jsonl"
        path.write_text(lines(record(input=name)), encoding="utf-8")
        os.utime(path, ns=(0, 0))
    read = [open_suite(tmp_path / n, cache_dir=cache).split("a", "train") for n in ("one", "two")]
    assert [data["input"][0] for data in read] == ["one", "two"]


@pytest.fixture
def chatty_datasets() -> Iterator[None]:
    verbosity, hidden = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_info()
    datasets.logging.enable_propagation()
    datasets.enable_progress_bars()
    yield
    datasets.logging.disable_propagation()
    datasets.logging.set_verbosity(verbosity)
    if hidden:
        datasets.disable_progress_bars()


@pytest.mark.usefixtures("chatty_datasets")
def test_reading_prints_nothing_and_leaves_the_settings_of_datasets(
    folder: Path,
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    suite = put(folder, cache, a=lines(record()), b=lines({}))
    validate(suite, ["a"])
    with pytest.raises(InputError):
        validate(suite, ["b"])
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == datasets.logging.INFO


def test_without_roles_the_first_record_tells_the_metric(folder: Path, cache: Path) -> None:
    suite = put(folder, cache, a=lines(record()), b=lines(record(choices=None)))
    assert suite.info("a") == TaskInfo("", "accuracy", None, True)
    assert suite.info("b") == TaskInfo("", "exact_match", None, False)
    assert training_tasks(suite) == ("a", "b")
    assert held_out_tasks(suite) == ()


def test_roles_tell_training_from_held_out_tasks(folder: Path, cache: Path) -> None:
    put_roles(folder, {"b": ROLE, "c": {**ROLE, "role": "train"}})
    suite = put(folder, cache, a=lines(record()), b=lines(record()), c=lines(record()))
    assert suite.info("b") == TaskInfo("logic", "accuracy", "held-out", True)
    assert training_tasks(suite) == ("a", "c")
    assert held_out_tasks(suite) == ("b",)


def test_a_selection_of_tasks_keeps_its_order(folder: Path, cache: Path) -> None:
    suite = put(folder, cache, a=lines(record()), b=lines(record()))
    assert check_tasks(suite, iter(["b", "a"])) == ("b", "a")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no task of the suite 'logic' was chosen"),
        (["rivers", "rivers"], "'rivers' is named twice"),
        (["rivers", "mountain"], "no task 'mountain'; did you mean 'mountains'"),
    ],
)
def test_a_wrong_selection_is_refused(
    folder: Path, cache: Path, names: list[str], message: str
) -> None:
    suite = put(folder, cache, rivers=lines(record()), mountains=lines(record()))
    with pytest.raises(InputError, match=message):
        check_tasks(suite, names)


@pytest.mark.parametrize(
    ("instruction", "text", "expected"),
    [("Add.", "1 2", "Add.\n1 2"), ("Add.", "", "Add."), ("", "1 2", "1 2"), ("", "", "")],
)
def test_a_prompt_leaves_out_an_empty_line(instruction: str, text: str, expected: str) -> None:
    assert prompt(instruction, text) == expected


SURROGATE = lines(record(input="x")).replace('"x"', '"\\ud83d"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record"),
        ("\n  \n", "holds no record"),
        (lines(record()) + "{'a': 1}\n", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 1 is not valid JSON"),
        (lines([1], [2]), "line 1: a record must be a JSON object, not a list"),
        (lines([{}]), r"holds one JSON list, and .* rename it to a\.json"),
        (lines(None), "line 1: a record must be a JSON object, not null"),
        (lines(record(), without("instruction")), "line 2: the field 'instruction' is missing"),
        (lines(without("input")), "line 1: the field 'input' is missing"),
        (lines(without("target")), "line 1: the field 'target' is missing"),
        (lines(without("choices")), "line 1: the field 'choices' is missing"),
        (lines(without("split")), "line 1: the field 'split' is missing"),
        (lines(record(instruction=["a"])), "'instruction' must be a string, not a list"),
        (lines(record(input=None)), "'input' must be a string, not null"),
        (lines(record(target=7)), "'target' must be a string, not a number"),
        (lines(record(target=True)), "'target' must be a string, not a boolean"),
        (lines(record(split="dev")), "'split' is 'dev' but must be one of train, validation, test"),
        (lines(record(choices="yes")), "'choices' must be a list of strings or null, not a string"),
        (lines(record(choices=["yes", 0])), "entry of the field 'choices' must be a string"),
        (lines(record(choices=["yes"])), "'choices' has fewer than 2 entries"),
        (lines(record(choices=["yes", "yes"])), "'choices' lists an entry twice"),
        (lines(record(), record(target="yess")), "line 2: the target 'yess' .* did you mean 'yes'"),
        (lines(record(), record(choices=None)), "line 2: the field 'choices' is null but"),
        (lines(record(choices=None), record()), "line 2: the field 'choices' is a list but"),
        (lines(record(task="b")), "the field 'task' is \"b\" but the file is for 'a'"),
        (lines(record(task=None)), "the field 'task' is null but"),
        (lines(record(instruction="", input="")), "'instruction' and 'input' are both empty"),
        (SURROGATE, "line 1: the field 'input' has half a surrogate pair"),
    ],
)
def test_a_wrong_task_file_is_refused(folder: Path, cache: Path, text: str, message: str) -> None:
    suite = put(folder, cache, a=text)
    with pytest.raises(InputError, match=message) as caught:
        validate(suite, ["a"])
    assert str(folder / "a.jsonl") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_utf8_is_refused(folder: Path, cache: Path) -> None:
    text = lines(record(), record(input="é"))
    (folder / "a.jsonl").write_bytes(text.replace("\\u00e9", "é").encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the text is not UTF-8"):
        open_suite(folder, cache_dir=cache).splits("a")


@pytest.mark.parametrize("text", ["", "{}\n"])
def test_a_wrong_first_record_is_refused_when_the_metric_is_asked(
    folder: Path, cache: Path, text: str
) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl"):
        put(folder, cache, a=text).info("a")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path.parent / "gone")])
def test_a_task_that_cannot_be_read_is_refused(folder: Path, cache: Path, make: Any) -> None:
    make(folder / "a.jsonl")
    suite = open_suite(folder, cache_dir=cache)
    for read in (suite.info, suite.splits):
        with pytest.raises(InputError, match=r"cannot read .*a\.jsonl"):
            read("a")


def test_a_cache_that_cannot_be_written_is_named_with_the_fix(folder: Path, cache: Path) -> None:
    cache.touch()
    suite = put(folder, cache, a=lines(record()))
    with pytest.raises(InputError, match=r"cannot cache the table of .*HF_DATASETS_CACHE"):
        suite.splits("a")


def test_a_split_that_does_not_exist_is_refused(folder: Path, cache: Path) -> None:
    suite = put(folder, cache, a=lines(record(), record(split="test")))
    with pytest.raises(InputError, match=r"no 'validation' split; .* its splits: train, test"):
        suite.split("a", "validation")
    with pytest.raises(InputError, match="no split 'tests'; did you mean 'test'"):
        suite.split("a", "tests")
    validate(suite, ["a"], needs=["train", "test"])
    with pytest.raises(InputError, match="no 'validation' split"):
        validate(suite, ["a"], needs=iter(["train", "validation"]))


def test_an_unknown_task_is_refused_by_every_method(folder: Path, cache: Path) -> None:
    suite = put(folder, cache, rivers=lines(record()))
    reads = (suite.info, suite.splits, lambda task: suite.split(task, "train"))
    for read in reads:
        with pytest.raises(InputError, match="no task 'river'; did you mean 'rivers'"):
            read("river")


def test_a_path_without_a_suite_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.jsonl file"):
        open_suite(folder)
    with pytest.raises(InputError, match="there is no suite at"):
        open_suite(folder / "gone")
    (folder / "notes.txt").touch()
    with pytest.raises(InputError, match=r"is a file of no known format; give a \.json, \.jsonl"):
        open_suite(folder / "notes.txt")
    with pytest.raises(InputError, match=r"has a name of 300 bytes in it"):
        open_suite(folder / ("x" * 300))


def test_a_folder_that_may_not_be_listed_is_refused(folder: Path) -> None:
    folder.chmod(0)
    if os.access(folder, os.R_OK):
        pytest.skip("this user may read every folder")
    with pytest.raises(InputError, match=r"cannot read .*you may read it"):
        open_suite(folder)


@pytest.mark.parametrize("names", [("Rivers", "rivers"), ("STRASSE", "straße")])
def test_names_that_differ_in_case_alone_are_refused(folder: Path, names: tuple[str, str]) -> None:
    for name in names:
        (folder / f"{name}.jsonl").touch()
    if len(list(folder.iterdir())) == 1:
        pytest.skip("this file system ignores case")
    with pytest.raises(InputError, match="differ only in upper and lower case"):
        JsonlSuite(folder)


def test_the_reserved_name_is_what_the_core_calls_the_average() -> None:
    assert RESERVED_TASK == MU


@pytest.mark.parametrize("name", ["mu", "Mu"])
def test_the_name_of_the_average_is_refused(folder: Path, name: str) -> None:
    (folder / f"{name}.jsonl").touch()
    with pytest.raises(InputError, match="the name kept for the average of the inventory"):
        JsonlSuite(folder)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "must hold one JSON object"),
        ({"b": ROLE}, r"names the task 'b', which has no file; .* add b\.jsonl"),
        ({"a": "train"}, "task 'a': the entry must be a JSON object, not a string"),
        ({"a": {**ROLE, "category": 1}}, "'category' must be a string, not 1"),
        ({"a": {**ROLE, "choices": "yes"}}, "'choices' must be true or false, not \"yes\""),
        (
            {"a": {**ROLE, "metric": "f1"}},
            A_METRIC,
        ),
        (
            {"a": {**ROLE, "metric": []}},
            A_METRIC,
        ),
        ({"a": {**ROLE, "role": "test"}}, "'role' must be one of train, held-out, not \"test\""),
        ({"a": {"category": "logic"}}, "'choices' must be true or false and is missing"),
        ({"a": {**ROLE, "choices": False}}, "the metric accuracy needs choices"),
    ],
)
def test_wrong_roles_are_refused(folder: Path, cache: Path, roles: Any, message: str) -> None:
    put_roles(folder, roles)
    with pytest.raises(InputError, match=message) as caught:
        put(folder, cache, a=lines(record()))
    assert str(folder / "roles.json") in str(caught.value)


@pytest.mark.parametrize("metric", ["exact_match", "strict_match", "rougeL"])
def test_roles_may_give_free_text_any_text_metric(folder: Path, cache: Path, metric: str) -> None:
    put_roles(folder, {"a": {**ROLE, "choices": False, "metric": metric}})
    suite = put(folder, cache, a=lines(record(choices=None)))
    assert suite.info("a") == TaskInfo("logic", metric, "held-out", False)


def test_every_metric_but_accuracy_scores_text() -> None:
    for metric in METRICS:
        if metric != "accuracy":
            assert text_metric(metric)("yes", "yes") == 1.0


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b""])
def test_roles_that_are_not_json_are_refused(folder: Path, cache: Path, content: bytes) -> None:
    (folder / "roles.json").write_bytes(content)
    with pytest.raises(InputError, match=r"roles\.json is not (valid JSON|UTF-8)"):
        put(folder, cache, a=lines(record()))


def test_roles_that_cannot_be_read_are_refused(folder: Path, cache: Path) -> None:
    (folder / "roles.json").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*roles\.json"):
        put(folder, cache, a=lines(record()))


def test_roles_that_contradict_the_records_are_refused(folder: Path, cache: Path) -> None:
    put_roles(folder, {"a": ROLE, "b": {**ROLE, "metric": "rougeL", "choices": False}})
    suite = put(folder, cache, a=lines(record(choices=None)), b=lines(record()))
    with pytest.raises(InputError, match=r"'a' have no choices but .* set its 'choices' to false"):
        suite.splits("a")
    with pytest.raises(InputError, match=r"'b' have choices but .* set its 'choices' to true"):
        suite.splits("b")


@pytest.mark.skipif(
    not (SHARED / "suite").is_dir(),
    reason="the shared suite is missing; set POLYROUTE_SHARED to the folder that holds suite/",
)
def test_tasks_of_the_shared_suite_are_read_as_their_files_say(cache: Path) -> None:
    suite = open_suite(SHARED / "suite", cache_dir=cache)
    assert (len(training_tasks(suite)), len(held_out_tasks(suite))) == (89, 45)
    tasks = ["arc_challenge", "bbh_object_counting", "e2e_describe"]
    validate(suite, tasks, needs=SPLITS)
    assert [suite.info(t).metric for t in tasks] == ["accuracy", "exact_match", "rougeL"]
    for task in tasks:
        text = (SHARED / "suite" / f"{task}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
        read = [row for split in SPLITS for row in suite.split(task, split)]
        assert read == [{name: row[name] for name in COLUMNS} for row in rows]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"validation": "x"}, "validation must be a whole number, not 'x'"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"resample": "no"}, "resample must be True or False, not 'no'"),
        ({"shots": "anli"}, "shots must be numbers by task, .* not 'anli'"),
        ({"sead": 1}, "has no option 'sead'"),
    ],
)
def test_options_of_a_reader_are_checked(option: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_suite("bigscience/P3", **option)
