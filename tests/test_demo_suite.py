"""Tests of the generated demo suite and of the base model shipped with it."""

from __future__ import annotations

import itertools
import json
import random
from importlib import resources
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from polyroute.demo.suite import (
    CODES,
    PRETRAINING,
    SKILLS,
    TASKS,
    DemoTask,
    Skills,
    answer,
    sample_words,
    write_suite,
)

BASE = Path(str(resources.files("polyroute.demo"))) / "base"
FRUITS = ("plum", "fig", "banana")
MONTHS = ("december", "may", "june")
NUMBERS = ("two", "eleven", "five")
STAGES = ("select", "transform", "format")
FIELDS = [
    "task",
    "category",
    "source",
    "licence",
    "split",
    "instruction",
    "input",
    "target",
    "choices",
]


def read_records(folder: Path, task: str) -> list[dict[str, str | None]]:
    """Read the file of one task."""
    lines = (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def suite_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small suite to look at."""
    folder = tmp_path_factory.mktemp("suite")
    write_suite(folder, train=30, validation=5, test=10)
    return folder


@pytest.mark.parametrize(
    ("words", "skills", "expected"),
    [
        (FRUITS, ("first", "upper", "bracket"), "[PLUM]"),
        (FRUITS, ("last", "upper", "bracket"), "[BANANA]"),
        (NUMBERS, ("longest", "upper", "bracket"), "[ELEVEN]"),
        (MONTHS, ("alphabetical", "upper", "bracket"), "[DECEMBER]"),
        (FRUITS, ("first", "reverse", "dash"), "-mulp-"),
        (FRUITS, ("last", "initial", "star"), "*b*"),
        (MONTHS, ("longest", "length", "bracket"), "[8]"),
        (MONTHS, ("first", "next", "dash"), "-january-"),
        (MONTHS, ("last", "next", "dash"), "-july-"),
        (NUMBERS, ("first", "next", "dash"), "-three-"),
        (("ten", "twelve", "one"), ("longest", "next", "star"), "*one*"),
        (FRUITS, ("first", "lookup", "star"), "*purple*"),
        (MONTHS, ("first", "lookup", "star"), "*winter*"),
        (NUMBERS, ("alphabetical", "lookup", "star"), "*11*"),
    ],
)
def test_answer(words: tuple[str, ...], skills: Skills, expected: str) -> None:
    """Each skill does what its name says."""
    assert answer(words, skills) == expected


@pytest.mark.parametrize(
    "skills",
    [("upper", "upper", "dash"), ("first", "dash", "dash"), ("first", "upper", "first")],
)
def test_answer_rejects_a_skill_of_another_stage(skills: Skills) -> None:
    """A skill only works at its own stage."""
    with pytest.raises(ValueError, match="unknown"):
        answer(FRUITS, skills)


def test_fruits_have_no_successor() -> None:
    """A domain without an order has no next word."""
    with pytest.raises(KeyError):
        answer(FRUITS, ("first", "next", "dash"))


def test_roles_are_disjoint_and_of_the_documented_size() -> None:
    """Held-out compositions are neither trained on nor pretrained on."""
    train = {task.skills for task in TASKS if task.role == "train"}
    held_out = {task.skills for task in TASKS if task.role == "held-out"}
    assert (len(train), len(held_out), len(PRETRAINING)) == (40, 12, 60)
    assert train <= set(PRETRAINING)
    assert held_out.isdisjoint(PRETRAINING)


def test_every_skill_and_pair_of_skills_is_trained() -> None:
    """What is held out are triples only."""
    train = [task.skills for task in TASKS if task.role == "train"]
    assert {skill for skills in train for skill in skills} == set(SKILLS)
    for first, second in itertools.combinations(STAGES, 2):
        expected = itertools.product(
            *([skill for skill in SKILLS if SKILLS[skill] == stage] for stage in (first, second))
        )
        i, j = STAGES.index(first), STAGES.index(second)
        assert {(skills[i], skills[j]) for skills in train} == set(expected)


def test_skills_stand_at_their_stage() -> None:
    """Compositions go from select over transform to format."""
    for skills in [*PRETRAINING, *(task.skills for task in TASKS)]:
        assert tuple(SKILLS[skill] for skill in skills) == STAGES


def test_codes_tell_the_skills_apart() -> None:
    """No two skills share a code, and none is the hidden mark."""
    assert set(CODES) == set(SKILLS)
    assert len(set(CODES.values())) == len(SKILLS)
    assert all(len(code) == 1 and code != "?" for code in CODES.values())


def test_names_and_instructions_are_unique_and_short() -> None:
    """Each task has a name and an instruction of its own."""
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert len({task.instruction for task in TASKS}) == len(TASKS)
    assert all(25 <= len(task.instruction.encode()) <= 45 for task in TASKS)


def test_inputs_are_well_formed() -> None:
    """Inputs have distinct words, a unique longest one, and stay short."""
    rng = random.Random(1)
    for skills in PRETRAINING:
        words = sample_words(rng, skills)
        *_, second, longest = sorted(len(word) for word in words)
        assert len(set(words)) == 3
        assert longest > second
        assert len(" ".join(words).encode()) <= 28
        assert 0 < len(answer(words, skills).encode()) <= 14


def test_every_task_is_written(suite_folder: Path) -> None:
    """The folder has one file per task."""
    names = {path.stem for path in suite_folder.glob("*.jsonl")}
    assert names == {task.name for task in TASKS}


@pytest.mark.parametrize("task", TASKS[::7], ids=lambda task: task.name)
def test_records(suite_folder: Path, task: DemoTask) -> None:
    """Records have the documented fields, and targets follow from inputs."""
    records = read_records(suite_folder, task.name)
    splits = [record["split"] for record in records]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [30, 5, 10]
    for record in records:
        assert list(record) == FIELDS
        assert record["task"] == task.name
        assert record["source"] == "generated"
        assert record["licence"] == "Apache-2.0"
        assert record["instruction"] == task.instruction
        assert record["choices"] is None
        assert isinstance(record["input"], str)
        assert record["target"] == answer(record["input"].split(" "), task.skills)


def test_inputs_differ_within_a_task(suite_folder: Path) -> None:
    """No input is in two splits."""
    for task in TASKS:
        inputs = [record["input"] for record in read_records(suite_folder, task.name)]
        assert len(set(inputs)) == len(inputs)


def test_roles_file(suite_folder: Path) -> None:
    """The roles file agrees with the tasks and the records."""
    roles = json.loads((suite_folder / "roles.json").read_text(encoding="utf-8"))
    assert {name: entry["role"] for name, entry in roles.items()} == {
        task.name: task.role for task in TASKS
    }
    for name, entry in roles.items():
        assert entry["metric"] == "strict_match"
        assert entry["choices"] is False
        assert entry["category"] == read_records(suite_folder, name)[0]["category"]


def test_suite_is_determined_by_its_seed(suite_folder: Path, tmp_path: Path) -> None:
    """The same seed writes the same bytes."""
    write_suite(tmp_path / "same", train=30, validation=5, test=10)
    write_suite(tmp_path / "other", seed=1, train=30, validation=5, test=10)
    for path in sorted(suite_folder.iterdir()):
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    name = f"{TASKS[0].name}.jsonl"
    assert (tmp_path / "other" / name).read_bytes() != (suite_folder / name).read_bytes()


def test_too_many_examples_are_refused(tmp_path: Path) -> None:
    """A task does not repeat inputs to reach a size."""
    with pytest.raises(ValueError, match="larger than population"):
        write_suite(tmp_path, train=10_000)


def test_base_has_the_skills() -> None:
    """The shipped base follows control codes."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(BASE, local_files_only=True)
    rng = random.Random(3)
    examples = [(skills, sample_words(rng, skills)) for skills in PRETRAINING for _ in range(2)]
    prompts = [
        "".join(CODES[skill] for skill in skills) + "\n" + " ".join(words)
        for skills, words in examples
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    outputs = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False
    )
    answers = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    targets = [answer(words, skills) for skills, words in examples]
    correct = sum(given == target for given, target in zip(answers, targets, strict=True))
    assert correct > 0.9 * len(targets)


def test_base_is_small() -> None:
    """The shipped base stays light enough for the package."""
    assert (BASE / "model.safetensors").stat().st_size < 8_000_000
