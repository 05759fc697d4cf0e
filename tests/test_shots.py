"""Shots: drawn evenly over the answers if that is asked for, and a warning where answers lack."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from base_models import t5

from polyroute.adapting.settings import AdaptSettings
from polyroute.adapting.shots import Shots, classes_of
from polyroute.errors import InputError
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.program.cli.app import main
from polyroute.study.examples import encoded_records

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def kind() -> ModelKind:
    return kind_of(*t5())


def rows(kind: ModelKind, answers: list[str], choices: list[Any]) -> list[Any]:
    records = [
        {"input": f"{i}", "target": answer, "choices": own}
        for i, (answer, own) in enumerate(zip(answers, choices, strict=True))
    ]
    return encoded_records(records, "task", kind)


def shared(kind: ModelKind, yes: int, no: int) -> list[Any]:
    """Examples with the same choices, in two orders."""
    answers = ["yes"] * yes + ["no"] * no
    return rows(kind, answers, [["yes", "no"], ["no", "yes"]] * (len(answers) // 2))


def own_choices(kind: ModelKind) -> list[Any]:
    return rows(kind, [f"a{i}" for i in range(12)], [[f"a{i}", f"b{i}"] for i in range(12)])


def test_examples_have_classes_if_all_have_the_same_choices(kind: ModelKind) -> None:
    found = classes_of(shared(kind, 3, 5))
    assert found is not None
    assert list(Counter(found).values()) == [3, 5]
    table = datasets.Dataset.from_list(shared(kind, 3, 5), features=kind.features)
    assert classes_of(table) == found
    assert classes_of(own_choices(kind)) is None
    assert classes_of(rows(kind, ["x", "y"], [None, None])) is None
    mixed = [*shared(kind, 2, 2)[:3], *own_choices(kind)[:1], *shared(kind, 2, 2)[3:]]
    assert classes_of(mixed) is None


def test_a_stratified_draw_has_as_many_of_each_answer_also_for_validation(kind: ModelKind) -> None:
    given = shared(kind, 6, 94)
    settings = AdaptSettings(shots=8, validation_shots=4, stratify=True)
    shots = Shots({"task": given}, [settings])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slots = [shots.slot("task", seed, "", settings) for seed in range(5)]
        shots.warn_of_missing()
    for slot in slots:
        assert Counter(index < 6 for index in slot.indices) == {True: 4, False: 4}
        assert Counter(index < 6 for index in slot.validation_indices) == {True: 2, False: 2}
        assert not set(slot.indices) & set(slot.validation_indices)
        assert slot.rows == [given[index] for index in slot.indices]
        assert shots.slot("task", slot.seed, "", settings).indices == slot.indices
    assert len({tuple(slot.indices) for slot in slots}) == 5


def test_one_sentence_says_where_answers_lack(kind: ModelKind) -> None:
    given = {"rare": shared(kind, 1, 99), "even": shared(kind, 50, 50), "own": own_choices(kind)}
    settings = AdaptSettings(shots=10)
    shots = Shots(given, [settings])
    for task in given:
        for seed in range(3):
            shots.slot(task, seed, "", settings)
            shots.slot(task, seed, "lr=1", settings)  # the same draw again
    with pytest.warns(UserWarning, match="draws of shots") as caught:
        shots.warn_of_missing()
    (one,) = caught
    assert str(one.message) == (
        "3 of 6 draws of shots have no example of some answer that their task offers (rare: up to "
        "1 of 2 in 3 of 3 draws): raise shots or set stratify"
    )


def test_without_classes_a_stratified_draw_is_plain_and_says_so_or_is_refused(
    kind: ModelKind,
) -> None:
    plain, even = AdaptSettings(shots=4), AdaptSettings(shots=4, stratify=True)
    given = {"own": own_choices(kind)}
    with pytest.raises(InputError, match="but task 'own' has no choices that all examples share"):
        Shots(given, [even])
    with pytest.warns(UserWarning, match="'own' has no .*: its shots are drawn without str"):
        shots = Shots({**given, "even": shared(kind, 4, 4)}, [even])
    expected = Shots(given, [plain]).slot("own", 3, "", plain).indices
    assert shots.slot("own", 3, "", even).indices == expected


def test_a_stratified_draw_of_all_examples_is_refused() -> None:
    with pytest.raises(InputError, match="stratify chooses among the examples of a task: set shot"):
        AdaptSettings(stratify=True)


def test_the_command_line_stratifies_and_records_it(
    place: Path, run: Path, capsys: Capture
) -> None:
    common = ["adapt", str(run), "--data", str(place / "suite"), "--shots", "4", "--steps", "1",
              "--seeds", "0,1"]  # fmt: skip
    out = place / "stratified"
    main([*common, "--tasks", "pick", "--stratify", "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    suite = [json.loads(line) for line in (place / "suite" / "pick.jsonl").read_text().splitlines()]
    train = [record["target"] for record in suite if record["split"] == "train"]
    for result in results:
        assert result["stratify"] is True
        assert Counter(train[i] for i in result["indices"]) == {"yes": 2, "no": 2}
    assert json.loads((out / "run.json").read_text())["config"]["stratify"] is True
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*common, "--tasks", "first", "--stratify", "--dry-run", "--out", str(place / "no")])
    assert "task 'first' has no choices that all examples share" in capsys.readouterr().err
