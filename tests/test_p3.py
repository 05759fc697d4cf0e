import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyroute.data.open import open_suite
from polyroute.data.readers import p3
from polyroute.data.readers.p3 import P3Suite
from polyroute.data.readers.p3_held_out import HeldOut, _templates
from polyroute.data.readers.p3_settings import P3Settings
from polyroute.data.suite import Suite, TaskInfo, held_out_tasks, training_tasks
from polyroute.errors import InputError


def prompts(folder: Path, name: str, count: int, **changes: Any) -> None:
    """A template with the columns and the file of the hub."""
    rows = [
        {
            "answer_choices": ["yes", "no"],
            "inputs": [1, 2],
            "inputs_pretokenized": f"Question {i}?",
            "targets": [3, 1],
            "targets_pretokenized": "\nyes",
            **changes,
        }
        for i in range(count)
    ]
    place = folder / name / "train-00000-of-00001.parquet"
    place.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), place)


def opened(folder: Path, **options: Any) -> Suite:
    return open_suite(folder, cache_dir=folder.parent / "cache", **{"validation": 2, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "P3"
    path.mkdir()
    return path


def numbers(rows: datasets.Dataset) -> list[int]:
    return [int(text.split()[-1][:-1]) for text in rows["input"]]


def test_the_table_has_the_published_training_sets() -> None:
    sizes = p3._table().sizes
    assert len(sizes) == 38
    assert len({name.split("/")[0] for name in sizes}) == 34
    assert sizes["glue/mrpc"] == (3668, "paraphrase")
    assert sizes["gigaword/None"] == (3803957, "summarisation")


def test_the_table_has_the_published_held_out_tasks() -> None:
    held_out = p3._table().held_out
    shots = dict.fromkeys(("copa", "wic", "rte", "cb", "wsc", "anli-r1", "anli-r2", "anli-r3"), 32)
    assert {task: entry["shots"] for task, entry in held_out.items()} == {
        **shots, "winogrande": 50, "h-swag": 20, "storycloze": 70,
    }  # fmt: skip


def test_a_template_is_a_task_of_its_data_set(folder: Path) -> None:
    prompts(folder, "glue_mrpc_equivalent", 5)
    prompts(folder, "glue_mrpc_want_to_know", 5)
    prompts(folder, "xsum_DOC_tldr", 5)
    prompts(folder, "xsum_DOC_tldr_score_eval", 5)
    prompts(folder, "gigaword_summarize_", 5)
    prompts(folder, "super_glue_rte_GPT_3_style", 5)
    suite = opened(folder)
    tasks = ("glue/mrpc/equivalent", "glue/mrpc/want_to_know", "xsum/None/DOC_tldr")
    assert (suite.name, suite.tasks, training_tasks(suite)) == ("P3", tasks, tasks)
    assert suite.info(tasks[0]) == TaskInfo("paraphrase", "exact_match", "train", False)
    assert suite.info(tasks[2]) == TaskInfo("summarisation", "rougeL", "train", False)
    row = {"task": tasks[0], "instruction": "", "target": "yes", "choices": None}
    train = suite.split(tasks[0], "train")
    assert train.to_list() == [{**row, "input": f"Question {i}?"} for i in numbers(train)]


def test_rows_of_the_same_size_and_time_are_read_again(folder: Path) -> None:
    file = folder / "trec_which" / "train-00000-of-00001.parquet"
    for word in ("Does", "Will"):
        prompts(folder, "trec_which", 5, inputs_pretokenized=f"{word} it?")
        os.utime(file, (1.6e9, 1.6e9))
        assert opened(folder).split("trec/None/which", "train")["input"][0] == f"{word} it?"
        shutil.rmtree(file.parent)


def test_data_sets_may_be_the_tasks(folder: Path) -> None:
    for name in ("equivalent", "want_to_know"):
        prompts(folder / "data", f"glue_mrpc_{name}", 5)
    suite = opened(folder, tasks="dataset")
    assert suite.tasks == ("glue/mrpc",)
    assert [len(suite.split("glue/mrpc", split)) for split in ("train", "validation")] == [6, 4]


def test_validation_rows_are_drawn_by_the_seed(folder: Path) -> None:
    prompts(folder, "trec_which", 60)
    drawn = []
    for seed in (0, 1):
        suite = opened(folder, seed=seed, validation=20)
        parts = [numbers(suite.split("trec/None/which", s)) for s in ("train", "validation")]
        assert sorted(parts[0] + parts[1]) == list(range(60))
        assert len(parts[1]) == 20
        drawn.append(set(parts[1]))
    assert drawn[0] != drawn[1]
    few = opened(folder, per_template=7).split("trec/None/which", "train")
    assert len(set(numbers(few))) == 7


def test_a_template_has_its_share_of_the_cap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gigaword_a", "gigaword_b", "gigaword_summarize_", "trec_a"):
        prompts(folder, name, 30)
    sizes = {"gigaword/None": (1000, "summarisation"), "trec/None": (20, "topic")}
    table = replace(p3._table(), cap=44, sizes=sizes)
    monkeypatch.setattr(p3, "_table", lambda: table)
    suite = opened(folder)
    for task, most in (("gigaword/None/a", 14), ("gigaword/None/b", 14), ("trec/None/a", 20)):
        used = [n for split in suite.splits(task) for n in numbers(suite.split(task, split))]
        assert sorted(used) == list(range(most))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("q", "\n a "), ("q", "a")),
        (("q", " "), ("q", "<NO LABEL>")),
        (("", "a"), ("<NO INPUT>", "<NO LABEL>")),
        ((None, None), ("<NO INPUT>", "<NO LABEL>")),
    ],
)
def test_an_empty_text_is_marked(
    folder: Path, given: tuple[str, str], expected: tuple[str, str]
) -> None:
    row = {"source": given[0], "target": given[1]}
    kept = {"source": "q", "target": "a"}
    (folder / "imdb_x.jsonl").write_text(f"{json.dumps(kept)}\n{json.dumps(row)}\n")
    rows = P3Suite(folder, P3Settings(validation=0), cache_dir=folder / "cache").split(
        "imdb/None/x", "train"
    )
    assert (rows[1]["input"], rows[1]["target"]) == expected


def test_processed_prompts_are_known_by_their_columns(folder: Path) -> None:
    row = {"inputs_pretokenized": "q", "targets_pretokenized": "a"}
    (folder / "imdb_x.json").write_text(json.dumps([row, row, row]))
    assert opened(folder).splits("imdb/None/x") == ("train", "validation")
    (folder / "imdb_x.json").unlink()
    record = {"instruction": "", "input": "q", "target": "a", "choices": None, "split": "train"}
    (folder / "imdb_x.jsonl").write_text(json.dumps(record))
    assert open_suite(folder).tasks == ("imdb_x",)


def test_wrong_templates_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="has no prompt template of a training data set"):
        P3Suite(folder)
    prompts(folder, "imdb_x", 2)
    with pytest.raises(InputError, match="imdb_x has 2 rows to use, and 2 are for validation"):
        opened(folder).splits("imdb/None/x")
    (folder / "trec_x").mkdir()
    with pytest.raises(InputError, match=r"trec_x holds no training rows"):
        opened(folder).splits("trec/None/x")
    (folder / "trec_x" / "train.jsonl").write_text('{"text": "q"}\n')
    with pytest.raises(InputError, match="have no column 'inputs_pretokenized', but text"):
        opened(folder).splits("trec/None/x")
    (folder / "trec_x" / "train.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"train\.jsonl: json cannot be loaded"):
        opened(folder).splits("trec/None/x")


TEMPLATES = """
dataset: super_glue
subset: cb
templates:
  1: !Template
    answer_choices: Yes ||| No ||| Maybe
    id: 1
    jinja: "{{premise}} So {{hypothesis}}? ||| {{answer_choices[label]}}"
    metadata: !TemplateMetadata {original_task: true}
    name: so
  2: !Template
    answer_choices: "{{hypothesis}} ||| no ||| ?"
    id: 2
    jinja: "{% if idx != 3 %}Choose: {{answer_choices | join(', ')}} ||| {{label}}{% endif %}"
    metadata: !TemplateMetadata {original_task: true}
    name: choose
  3: !Template
    answer_choices: null
    id: 3
    jinja: "Write. ||| {{premise}}"
    metadata: !TemplateMetadata {original_task: false}
    name: write
"""


def example(number: int) -> dict[str, Any]:
    return {"premise": f"p{number}", "hypothesis": "a|||b", "idx": number, "label": number % 3}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def held_out(folder: Path) -> Path:
    """A folder with the held-out task cb."""
    raw = folder / "raw" / "super_glue" / "cb"
    shots = folder / "few_shot" / "cb" / "32_shot"
    templates = folder / "templates" / "super_glue" / "cb"
    for place in (raw, shots, templates):
        place.mkdir(parents=True)
    (raw / "train.jsonl").write_text(lines(*map(example, range(100, 150))))
    (raw / "validation.jsonl").write_text(lines(*map(example, range(6))))
    (shots / "42_seed.jsonl").write_text(lines(*map(example, range(50, 82))))
    (templates / "templates.yaml").write_text(TEMPLATES)
    return folder


def test_a_held_out_task_is_shown_in_templates(held_out: Path) -> None:
    suite = opened(held_out, all_templates=True)
    assert held_out_tasks(suite) == suite.tasks == ("cb",)
    assert suite.info("cb") == TaskInfo("entailment", "accuracy", "held-out", True)
    train, test = (suite.split("cb", split) for split in ("train", "test"))
    assert (suite.splits("cb"), len(train), len(test)) == (("train", "test"), 64, 12)
    usual = {"task": "cb", "instruction": ""}
    own = ["a|||b", "no", "?"]
    assert test.to_list()[2:8] == [
        {**usual, "input": "Choose: a|||b, no, ?", "target": "no", "choices": own},
        {**usual, "input": "p1 So a|||b?", "target": "No", "choices": ["Yes", "No", "Maybe"]},
        {**usual, "input": "Choose: a|||b, no, ?", "target": "?", "choices": own},
        {**usual, "input": "p2 So a|||b?", "target": "Maybe", "choices": ["Yes", "No", "Maybe"]},
        {**usual, "input": "<NO INPUT>", "target": "a|||b", "choices": own},
        {**usual, "input": "p3 So a|||b?", "target": "Yes", "choices": ["Yes", "No", "Maybe"]},
    ]


def test_each_example_is_shown_in_a_template_drawn_by_the_seed(held_out: Path) -> None:
    shots = held_out / "few_shot" / "cb" / "32_shot"
    (shots / "0_seed.jsonl").write_text((shots / "42_seed.jsonl").read_text())
    first, again, other = (opened(held_out, seed=seed).split("cb", "train") for seed in (42, 42, 0))
    assert len(first) == 32
    assert list(first["input"]) == list(again["input"]) != list(other["input"])
    assert 4 < sum("So" in text for text in first["input"]) < 28


def test_a_missing_few_shot_file_is_an_error(held_out: Path) -> None:
    with pytest.raises(InputError, match=r"no .*7_seed\.jsonl; .*\(32_shot/42_seed\.jsonl\), or"):
        opened(held_out, seed=7).split("cb", "train")
    with pytest.raises(InputError, match=r"no .*16_shot.42_seed\.jsonl"):
        opened(held_out, shots={"cb": 16}).split("cb", "train")
    path = held_out / "few_shot" / "cb" / "32_shot" / "42_seed.jsonl"
    path.write_text(lines(example(0)))
    with pytest.raises(InputError, match="has 1 examples and should have 32"):
        opened(held_out).split("cb", "train")


def test_shots_are_drawn_anew_where_that_is_asked_for(held_out: Path) -> None:
    suite = opened(held_out, seed=7, resample=True, all_templates=True)
    shown = [text[1:4] for text in suite.split("cb", "train")["input"] if "So" in text]
    order = np.arange(100, 150)
    np.random.RandomState(7).shuffle(order)  # as `np.random.seed(7); np.random.shuffle(rows)`
    assert shown == [str(number) for number in order[:32]]
    assert len(held_out_tasks(suite)) == 11


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("original_task: true", "original_task: false", "no template of super_glue/cb .* original"),
        ("{{premise}} So", "{{premise So", "the template 'so' cannot be rendered"),
        ("{{premise}} So", "{{premise.x.y}} So", "the template 'so' cannot be rendered"),
        ("Yes ||| No ||| Maybe", "null", "is not the place of an answer"),
        ("Yes ||| No ||| Maybe", "Yes ||| No", "label' is 2, which is not the place of an answer"),
        ("templates:", "other:", "is not a file of prompt templates"),
        ("!Template\n", "!!python/object:os.system\n", "is not valid YAML"),
    ],
)
def test_wrong_templates_of_a_held_out_task_are_refused(
    held_out: Path, old: str, new: str, message: str
) -> None:
    path = held_out / "templates" / "super_glue" / "cb" / "templates.yaml"
    path.write_text(TEMPLATES.replace(old, new))
    with pytest.raises(InputError, match=message):
        opened(held_out, all_templates=True).splits("cb")
    path.unlink()
    with pytest.raises(InputError, match="give the folder `templates` of promptsource"):
        opened(held_out).splits("cb")


def test_a_missing_evaluation_split_is_refused(held_out: Path) -> None:
    (held_out / "raw" / "super_glue" / "cb" / "validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"cb has no validation\.jsonl"):
        opened(held_out).splits("cb")


def test_a_template_cannot_reach_python(held_out: Path) -> None:
    path = held_out / "templates" / "super_glue" / "cb" / "templates.yaml"
    path.write_text(TEMPLATES.replace("{{premise}} So", "{{ premise.__class__.__mro__ }} So"))
    with pytest.raises(InputError, match=r"'so' cannot be rendered .*unsafe"):
        opened(held_out, all_templates=True).splits("cb")


def test_an_answer_may_be_counted_from_one(folder: Path) -> None:
    raw, templates = (folder / n / "winogrande" / "winogrande_xl" for n in ("raw", "templates"))
    shots = folder / "few_shot" / "winogrande" / "50_shot"
    for place in (raw, templates, shots):
        place.mkdir(parents=True)
    rows = [{"sentence": "s", "option1": "a", "option2": "b", "answer": n} for n in ("1", "2")]
    (raw / "validation.jsonl").write_text(lines(*rows))
    (shots / "42_seed.jsonl").write_text(lines(*rows) * 25)
    (templates / "templates.yaml").write_text(
        "templates:\n  1: !Template\n    name: x\n    jinja: '{{sentence}} ||| y'\n"
        "    answer_choices: '{{option1}} ||| {{option2}}'\n"
        "    metadata: {original_task: true}\n"
    )
    test = opened(folder).split("winogrande", "test")
    assert [(row["target"], row["choices"]) for row in test] == [
        ("a", ["a", "b"]),
        ("b", ["a", "b"]),
    ]


def test_copa_is_shown_in_the_first_eight_templates(folder: Path) -> None:
    place = folder / "super_glue" / "copa" / "templates.yaml"
    place.parent.mkdir(parents=True)
    template = "  {0}: !Template\n    jinja: x ||| y\n    metadata: {{original_task: true}}\n"
    entries = [template.format(name) + f"    name: {name}\n" for name in "ihgfedcba"]
    place.write_text("templates:\n" + "".join(entries))
    settings = HeldOut(None, folder, None, P3Settings(seed=0), None)
    shown = _templates("super_glue", "copa", p3._table().held_out["copa"], settings)
    assert "".join(each.name for each in shown) == "abcdefgh"


def test_links_are_not_followed_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    prompts(tmp_path / "elsewhere", "trec_which", 5)
    (folder / "trec_which").symlink_to(tmp_path / "elsewhere" / "trec_which")
    with pytest.raises(InputError, match="leads out of its folder"):
        opened(folder)
