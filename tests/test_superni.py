import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from base_models import t5
from datasets import Dataset

from polyroute.data.metrics import baselines, best_match
from polyroute.data.open import open_suite
from polyroute.data.readers.superni_text import TK_INSTRUCT, Encoding, render
from polyroute.data.suite import Suite, TaskInfo, held_out_tasks, training_tasks
from polyroute.errors import InputError
from polyroute.study.evaluate import Questions, score_rows


def task(count: int = 0, **changes: Any) -> dict[str, Any]:
    """What a task file holds."""
    examples = [
        {"input": f"p{i}", "output": f"P{i}!", "explanation": f"because {i}"} for i in (1, 2, 3)
    ]
    return {
        "Contributors": ["us"],
        "Categories": ["Question Answering"],
        "Definition": ["Answer it"],
        "Positive Examples": examples,
        "Negative Examples": [{"input": "n1?", "output": "N1"}, {"input": "n2", "output": "N2"}],
        "Instances": [
            {"id": f"i{i}", "input": f"q{i}?", "output": [f"a{i}", f"A {i}"]} for i in range(count)
        ],
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "ni"
    (path / "tasks").mkdir(parents=True)
    (path / "splits" / "default").mkdir(parents=True)
    return path


def put(folder: Path, train: dict[str, Any], test: dict[str, Any], **options: Any) -> Suite:
    """Write the task files and the split files, and open the suite."""
    for name, content in {**train, **test}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "tasks" / f"{name}.json").write_text(text, encoding="utf-8")
    for name, tasks in (("train", train), ("test", test)):
        (folder / "splits" / "default" / f"{name}_tasks.txt").write_text("\n".join(tasks) + "\n")
    return open_suite(folder, cache_dir=folder.parent / "cache", **options)


def test_the_split_files_give_the_roles_and_the_json_the_category(folder: Path) -> None:
    (folder / "tasks" / "excluded.json").write_text("{}")
    suite = put(folder, {"b": task(3)}, {"a": task(3, Categories=["Title Generation", "x"])})
    assert (suite.name, suite.tasks) == ("ni", ("a", "b"))
    assert (training_tasks(suite), held_out_tasks(suite)) == (("b",), ("a",))
    assert suite.info("a") == TaskInfo("title_generation", "rougeL", "held-out", False)


def test_the_category_is_found_wherever_it_is(folder: Path) -> None:
    content = task(1, Source=[', "Categories": ["no"]' + "x" * (1 << 17)])
    content["Categories"] = content.pop("Categories")  # goes to the end
    assert put(folder, {"a": content}, {}).info("a").category == "question_answering"


def numbers(rows: Dataset) -> list[int]:
    """Which instances the rows are."""
    return [int(text.rpartition("q")[2].partition("?")[0]) for text in rows["input"]]


def test_a_training_task_has_a_hundred_random_instances(folder: Path) -> None:
    suite = put(folder, {"a": task(300)}, {})
    assert suite.splits("a") == ("train",)
    chosen = numbers(suite.split("a", "train"))
    assert len(set(chosen)) == 100
    assert chosen != sorted(chosen)
    again = put(folder, {"a": task(300)}, {}, seed=42)
    other = put(folder, {"a": task(300)}, {}, seed=13)
    assert numbers(again.split("a", "train")) == chosen
    assert set(numbers(other.split("a", "train"))) != set(chosen)


def test_a_held_out_task_is_tested_on_its_first_hundred_instances(folder: Path) -> None:
    suite = put(folder, {}, {"a": task(180)})
    assert suite.splits("a") == ("train", "test")
    assert numbers(suite.split("a", "test")) == list(range(100))
    assert sorted(numbers(suite.split("a", "train"))) == list(range(100, 180))


@pytest.mark.parametrize(("count", "validation"), [(300, 32), (150, 18)])
def test_the_few_shot_protocol_splits_64_instances_by_its_seed(
    folder: Path, count: int, validation: int
) -> None:
    drawn = []
    for seed in (13, 42):
        suite = put(folder, {}, {"a": task(count)}, few_shot=64, seed=seed)
        parts = [numbers(suite.split("a", split)) for split in ("train", "validation")]
        assert [len(part) for part in parts] == [32, validation]
        assert len({*parts[0], *parts[1]}) == 32 + validation
        assert min(*parts[0], *parts[1]) >= 100
        assert numbers(suite.split("a", "test")) == list(range(100))
        drawn.append(parts[0])
    assert drawn[0] != drawn[1]


def test_all_answers_are_references_and_a_random_one_is_the_target(folder: Path) -> None:
    rows = put(folder, {"a": task(100)}, {}).split("a", "train")
    assert rows.column_names[-1] == "references"
    firsts = 0
    for number, row in zip(numbers(rows), rows, strict=True):
        assert row["references"] == [f"a{number}", f"A {number}"]
        assert row["target"] in row["references"]
        firsts += row["target"] == row["references"][0]
    assert 20 < firsts < 80


def test_the_text_is_the_published_one() -> None:
    content = task()
    plain = "Now complete the following example -\nInput: q?\nOutput:"
    assert render(content, " q? ") == "Task definition: Answer it.\n" + plain
    assert render(content, "q?", encoding=Encoding(definition=False)) == plain
    everything = Encoding(positive=2, negative=1, explanations=True, task_name=True)
    assert render(content, "q?", name="task1_x", encoding=everything, eos="<e>") == (
        "task1_x. Task definition: Answer it.\n"
        " Positive Example 1 -\nInput: p1.\n Output: P1! <e>\n Explanation: because 1.\n\n"
        " Positive Example 2 -\nInput: p2.\n Output: P2! <e>\n Explanation: because 2.\n\n"
        " Negative Example 1 -\nInput: n1?\n Output: N1. <e>\n\n" + plain
    )


@pytest.mark.parametrize(
    ("text", "dotted"),
    [("q", "q."), ("q)", "q)"), (" q. \n", "q."), ("", "."), ("q。", "q。."), ("q_", "q_")],
)
def test_a_piece_ends_in_punctuation(text: str, dotted: str) -> None:
    assert render(task(), text).endswith(f"-\nInput: {dotted}\nOutput:")


def at_most(length: int) -> Callable[[str], bool]:
    return lambda text: len(text) <= length


def test_examples_are_left_out_from_where_they_no_longer_fit() -> None:
    whole = [render(task(), "q", encoding=Encoding(positive=n)) for n in range(4)]
    for n in range(1, 4):
        for length, expected in ((len(whole[n]), n), (len(whole[n]) - 1, n - 1)):
            text = render(task(), "q", encoding=Encoding(positive=3), fits=at_most(length))
            assert text == whole[expected]


def test_a_long_text_is_cut_before_its_end() -> None:
    whole = render(task(), "word " * 100)
    for length in (8, 60, len(whole) - 1):
        cut = render(task(), "word " * 100, fits=at_most(length))
        assert cut == whole[: length - 8] + "\nOutput:"
    with pytest.raises(InputError, match="max_input is too small"):
        render(task(), "word", fits=at_most(7))


@pytest.mark.parametrize("max_input", [16, 40, 200])
def test_every_text_fits_its_tokens_with_the_end_token(folder: Path, max_input: int) -> None:
    _, tokenizer = t5()
    long = [{"input": "cat " * n, "output": ["dog"]} for n in (1, 10, 30, 300)]
    suite = put(
        folder,
        {"a": task(Instances=long)},
        {},
        tokenizer=tokenizer,
        max_input=max_input,
        encodings=TK_INSTRUCT,
    )
    texts = suite.split("a", "train")["input"]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert all(text.endswith("\nOutput:") for text in texts)
    assert all(length <= max_input for length in lengths)
    assert max_input - max(lengths) <= 1


def test_a_tokenizer_may_be_named(folder: Path) -> None:
    _, tokenizer = t5()
    tokenizer.save_pretrained(folder.parent / "base")
    texts = [
        put(folder, {"a": task(1)}, {}, tokenizer=given, max_input=20).split("a", "train")["input"]
        for given in (tokenizer, str(folder.parent / "base"))
    ]
    assert list(texts[0]) == list(texts[1])
    with pytest.raises(InputError, match="the tokenizer '/gone' cannot be loaded"):
        put(folder, {"a": task(1)}, {}, tokenizer="/gone")


def test_the_table_of_another_budget_is_another(folder: Path) -> None:
    _, tokenizer = t5()
    put(folder, {"a": task(1)}, {})
    suites = [
        open_suite(folder, cache_dir=folder.parent / "cache", tokenizer=tokenizer, max_input=n)
        for n in (20, 30)
    ]
    lengths = [len(suite.split("a", "train")[0]["input"]) for suite in suites]
    assert lengths[0] < lengths[1]


def test_tk_instruct_draws_among_five_encodings(folder: Path) -> None:
    rows = put(folder, {"a": task(100)}, {}, encodings=TK_INSTRUCT).split("a", "train")
    found = [
        (t.startswith("Task definition"), t.count("Positive"), t.count("Negative"), "Expl" in t)
        for t in rows["input"]
    ]
    expected = [(e.definition, e.positive, e.negative, e.explanations) for e in TK_INSTRUCT]
    assert set(found) == set(expected)
    assert all(8 < found.count(each) < 35 for each in expected)


class Writer:
    """A kind whose answers are given, by the row's place."""

    needs_choices = True  # it has no loss of a text

    def __init__(self, *answers: str) -> None:
        self.answers = answers

    def generate(self, _: object, rows: list[dict[str, Any]]) -> list[str]:
        return [self.answers[row["index"]] for row in rows]


def test_text_is_scored_against_the_nearest_reference() -> None:
    rows = Dataset.from_dict({"prompt_ids": [[1], [1, 2]], "task": ["a", "a"]})
    model: Any = None
    kind: Any = Writer("The cat", "a dog")
    answers = [["a bird", "the cat."], ["dog", "cat"]]
    for given in (answers, ["the cat", "dog"]):
        asked = Questions(rows, given, "exact_match")
        assert score_rows(model, kind, asked, route="a") == (0.5, None)
    assert best_match(lambda a, b: abs(len(a) - len(b)), "aa", ["a", "aaaaa", "b"]) == 3


def test_the_majority_is_scored_against_the_nearest_reference() -> None:
    rows = {"target": ["x", "y"], "choices": [None, None], "references": [["x", "a"], ["y"]]}
    train = Dataset.from_dict({"target": ["a"]})
    assert baselines(train, Dataset.from_dict(rows)).majority == 0.5


WRONG = {
    "is not valid JSON": "{",
    "must hold one JSON object": "[]",
    "'Definition' must be a list of at least one string": task(1, Definition=[]),
    "'Instances' must be a list": task(Instances=None),
    "instance 0: 'input' must be a string": task(Instances=[{"output": ["a"]}]),
    "instance 1: 'output' must be a list of": task(
        Instances=[{"input": "q", "output": "a"}, {"input": "q", "output": []}]
    ),
    "Positive Examples, number 0: 'output' must be": task(
        1, **{"Positive Examples": [{"input": "q"}]}
    ),
    "holds no record": task(0),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_task_file_is_refused(folder: Path, message: str) -> None:
    suite = put(folder, {"a": WRONG[message]}, {})
    with pytest.raises(InputError, match=message) as caught:
        suite.splits("a")
    assert str(folder / "tasks" / "a.json") in str(caught.value)


def test_wrong_split_files_are_refused(folder: Path) -> None:
    (folder / "splits" / "default" / "train_tasks.txt").write_text("a")
    with pytest.raises(InputError, match=r"names the task 'a', but .* has no a\.json"):
        open_suite(folder)
    with pytest.raises(InputError, match="names the task 'a' a second time"):
        put(folder, {"a": task(1)}, {"a": task(1)})
    with pytest.raises(InputError, match="name no task"):
        put(folder, {}, {})
    (folder / "splits" / "default" / "test_tasks.txt").unlink()
    with pytest.raises(InputError, match=r"cannot read .*test_tasks\.txt"):
        open_suite(folder)
    with pytest.raises(InputError, match="has no 'Categories'"):
        put(folder, {"a": {"Instances": []}}, {}).info("a")


def test_an_option_of_another_reader_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"SuperNiSuite, which reads .* has no option 'resample'"):
        put(folder, {"a": task(1)}, {}, resample=True)


@pytest.mark.parametrize("name", ["splits/default/train_tasks.txt", "tasks/a.json"])
def test_links_are_not_followed_out_of_the_folder(folder: Path, name: str) -> None:
    put(folder, {"a": task(3)}, {})
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(InputError, match="leads out of its folder"):
        open_suite(folder, cache_dir=folder.parent / "cache").info("a")
