"""The validation loss of training: what it is measured on, and where it is shown."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from commands_run import Capture, document, read, refused
from safetensors.torch import load_file
from test_packing import PACKING, kind, routed, rows
from tiny_runs import train_arguments, write_base, write_suite

from polyroute.program.cli.app import main
from polyroute.program.commands.validation import _tell
from polyroute.report_page.charts import learning
from polyroute.report_page.data import read_runs
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

EVERY_FIVE = ("--eval-steps", "5")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    write_suite(folder / "suite")
    write_base(folder / "base")
    return folder


def without_validation(place: Path, keep: int = 44) -> str:
    """The suite, but one task has no validation split, and so many training examples."""
    folder = place / f"suite-{keep}"
    write_suite(folder)
    file = folder / "copy.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    train = [r for r in records if r["split"] == "train"][:keep]
    test = [r for r in records if r["split"] == "test"]
    file.write_text("\n".join(json.dumps(r) for r in (*train, *test)) + "\n")
    return str(folder)


@pytest.mark.parametrize("objective", ["lm", "superni"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_loss_is_that_of_all_rows_as_one_batch(
    objective: str, size: int, tmp_path: Path
) -> None:
    its, some = kind(objective=objective), sorted(rows(), key=lambda row: row["task"])
    columns = [{**row, "prompt_cut": 0, "target_cut": 0} for row in some]
    data = datasets.Dataset.from_list(columns, features=its.features)
    model = routed(PACKING["llama"])
    args = MultiTaskTrainingArguments(
        str(tmp_path), per_device_eval_batch_size=size, report_to="none", use_cpu=True
    )
    found = MultiTaskTrainer(model, its, args, eval_dataset=data).evaluate()["eval_loss"]
    with torch.no_grad():
        expected = its.loss(model.eval(), its.collate(some)).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_keeps_its_validation_losses_and_a_report_draws_them(
    place: Path, capsys: Capture
) -> None:
    found = document(train_arguments(place, "shown", *EVERY_FIVE), capsys)
    log = [entry for entry in read(place / "shown" / "metrics.json")["log"] if "eval_loss" in entry]
    assert [entry["step"] for entry in log] == [5, 10, 12]  # and at the end
    assert found["eval_loss"] == log[-1]["eval_loss"]
    runs, _ = read_runs([place / "shown"])
    chart = learning(runs, {runs[0].name: 0})
    assert chart is not None
    training, validation = chart.series
    assert validation.name == f"{training.name}, validation"
    assert [point.y for point in validation.points] == [entry["eval_loss"] for entry in log]


def test_validation_changes_nothing_of_what_is_trained(place: Path, capsys: Capture) -> None:
    main(train_arguments(place, "plain"))
    main(train_arguments(place, "validated", *EVERY_FIVE))
    assert "validation loss is" in capsys.readouterr().out
    assert not any("eval_loss" in entry for entry in read(place / "plain" / "metrics.json")["log"])
    one, other = (
        load_file(place / name / "inventory.safetensors") for name in ("plain", "validated")
    )
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor)


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(place: Path) -> None:
    main(train_arguments(place, "whole", *EVERY_FIVE))
    main(train_arguments(place, "again", *EVERY_FIVE))
    (place / "again" / "metrics.json").unlink()
    (place / "again" / "polyroute.json").unlink()
    for folder in place.glob("again/checkpoint-12"):
        folder.rename(place / "last")
    main(train_arguments(place, "again", *EVERY_FIVE, "--resume"))
    losses = [
        [(e["step"], e["eval_loss"]) for e in read(place / name / "metrics.json")["log"]
         if "eval_loss" in e]
        for name in ("whole", "again")
    ]  # fmt: skip
    assert [step for step, _ in losses[1]] == [5, 10, 12]
    assert losses[1] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses[0]]


def dry(place: Path, capsys: Capture, suite: str, *more: str) -> tuple[dict[str, Any], str]:
    """The examples that would train, by task, and what is said about validation."""
    arguments = train_arguments(place, "dry", *EVERY_FIVE, *more, "--dry-run", "--json")
    arguments[arguments.index("--data") + 1] = suite
    capsys.readouterr()
    main(arguments)
    out, said = capsys.readouterr()
    return {row["task"]: row["examples"] for row in json.loads(out)["tasks"]}, said


def test_a_tenth_is_set_aside_where_there_is_no_validation_split(
    place: Path, capsys: Capture
) -> None:
    sizes, said = dry(place, capsys, without_validation(place))
    assert sizes == {"back": 44, "copy": 40, "upper": 44}
    assert (
        "copy has no validation split, so a tenth of its training examples, at most 32, is set "
        "aside and does not train\n"
    ) in said
    sizes, _ = dry(place, capsys, str(place / "suite-44"), "--max-eval", "2")
    assert sizes["copy"] == 42


def test_a_task_of_few_examples_trains_on_all_of_them(place: Path, capsys: Capture) -> None:
    sizes, said = dry(place, capsys, without_validation(place, 9))
    assert sizes["copy"] == 9
    assert "copy has fewer than 10 training examples and is not validated on" in said


@pytest.mark.parametrize(("count", "names"), [(2, "a and b"), (5, "a, b, c and 2 more")])
def test_several_tasks_are_named_in_one_sentence(count: int, names: str, capsys: Capture) -> None:
    some = list("abcdefg")[:count]
    _tell(some, some, 8, continued=True)
    assert capsys.readouterr().out == (
        f"{names} have no validation split, so a tenth of their training examples, at most 8 each, "
        "is set aside and does not train; the run that training goes on from may have trained on "
        f"these examples\n{names} have fewer than 10 training examples and are not validated on\n"
    )


def test_a_run_that_goes_on_says_that_the_first_may_have_trained_on_what_is_set_aside(
    place: Path, capsys: Capture
) -> None:
    suite = without_validation(place, 43)
    first = train_arguments(place, "first")
    first[first.index("--data") + 1] = suite
    main(first)
    capsys.readouterr()
    given = ["--start", str(place / "first"), "--data", suite, "--steps", "2", "--dry-run"]
    main(["train", *given, "--out", str(place / "second"), *EVERY_FIVE])
    assert "does not train; the run that training goes on from may" in capsys.readouterr().out


def test_validation_examples_that_are_too_long_are_counted(place: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    write_suite(suite)
    file = suite / "copy.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if record["split"] == "validation":
            record["input"] = "x " * 400
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    arguments = train_arguments(place, "long", *EVERY_FIVE, "--dry-run")
    arguments[arguments.index("--data") + 1] = str(suite)
    with pytest.warns(UserWarning, match="validation prompts are too long"):
        main(arguments)


def test_a_bound_without_a_validation_loss_is_refused(place: Path, capsys: Capture) -> None:
    error = refused(train_arguments(place, "bound", "--max-eval", "2"), capsys)
    assert "--max-eval is for the validation loss; add --eval-steps" in error
