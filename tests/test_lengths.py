"""The most tokens that are read of an example, where nobody says them: the data decides."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import llama
from tiny_runs import train_arguments
from transformers import ByT5Tokenizer

from polyroute.data.open import open_suite
from polyroute.kinds.choose import kind_of
from polyroute.kinds.seq2seq import Seq2SeqKind
from polyroute.program.cli.app import main
from polyroute.program.commands.lengths import Measured, settled_lengths
from polyroute.program.commands.runs import base_of
from polyroute.program.options.shared import Given, Reading
from polyroute.study.lengths import usual_lengths

Capture = pytest.CaptureFixture[str]

CHOICES = ["y" * 4, "n" * 29]


def write(folder: Path) -> Path:
    """Nineteen short prompts and a long one, and a task of longer prompts with choices."""
    folder.mkdir()
    short = [{"input": "s" * (200 if i == 7 else 10), "target": "t" * 5} for i in range(20)]
    # One token ends a text, so these prompts have 41 tokens and the longest choice has 30.
    long = [{"input": "l" * 40, "target": CHOICES[i % 2], "choices": CHOICES} for i in range(20)]
    for task, records in {"short": short, "long": long}.items():
        usual = {"instruction": "", "choices": None}
        rows = [{**usual, **r, "split": s} for r in records for s in ("train", "test")]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run / "run.json").read_text())["config"]
    return config


def arguments(place: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [
        "train", "--model", str(place / "base"), "--data", str(data), "--steps", "2",
        "--batch-size", "4", "--skills", "2", "--out", str(out), *extra,
    ]  # fmt: skip


def test_lengths_are_the_largest_of_the_tasks_95_percent(tmp_path: Path) -> None:
    suite = open_suite(write(tmp_path / "suite"))
    kind = Seq2SeqKind(ByT5Tokenizer(), max_input=2, max_target=2)
    short = usual_lengths(suite, ["short"], "train", kind)
    assert (short.prompt, short.target) == (11, 6)  # the one long prompt of twenty is left out
    both = usual_lengths(suite, ["short", "long"], "train", kind)
    assert (both.prompt, both.target) == (41, 30)  # those of the task with the longer examples


def test_every_other_example_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    rows = [
        {"instruction": "", "input": "x" * (30 if i % 2 else 3), "target": "t", "choices": None,
         "split": "train"}
        for i in range(1000)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "suite" / "turns.jsonl").write_text(text)
    kind = Seq2SeqKind(ByT5Tokenizer(), max_input=2, max_target=2)
    usual = usual_lengths(open_suite(tmp_path / "suite"), ["turns"], "train", kind)
    assert usual.prompt == 31
    assert usual.is_sample


def test_a_run_and_all_that_reads_it_have_the_lengths_of_its_training_data(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    data, run = write(tmp_path / "suite"), tmp_path / "run"
    with pytest.warns(UserWarning, match="raise max_input, which is 48"):
        main(arguments(place, data, run))
    said = capsys.readouterr().out
    assert (
        "--max-input is 48: 95 % of the prompts of every task have at most 41 tokens\n"
        "--max-target is 32: 95 % of the targets and choices of every task have at most 30 tokens\n"
    ) in said
    config = config_of(run)
    assert (config["max_input"], config["max_target"]) == (48, 32)
    with pytest.warns(UserWarning, match="max_input, which is 48"):
        main(["evaluate", str(run), "--data", str(data)])
    found = json.loads((run / "evaluate-test.json").read_text())
    assert (found["max_input"], found["max_target"]) == (48, 32)

    (data / "long.jsonl").unlink()  # the data would now ask for less
    with pytest.warns(UserWarning, match="max_input, which is 16"):
        main([*arguments(place, data, run, "--tasks", "short"), "--dry-run", "--overwrite"])
    assert "--max-input is 16: 95 %" in capsys.readouterr().out


def test_new_tasks_may_be_read_to_other_lengths_than_those_of_the_training(
    place: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data, run = write(tmp_path / "suite"), tmp_path / "run"
    main(arguments(place, data, run, "--tasks", "long"))
    common = ["--data", str(data), "--tasks", "short", "--max-input", "208"]
    adapting = ["--phase", "mu", "--steps", "1", "--shots", "2", "--seeds", "0"]
    recwarn.clear()
    main(["adapt", str(run), *common, *adapting, "--out", str(tmp_path / "adapted")])
    main(["evaluate", str(run), *common, "--zero-shot", "--out", str(tmp_path / "scores.json")])
    assert not [warning for warning in recwarn if "too long" in str(warning.message)]
    assert json.loads((tmp_path / "scores.json").read_text())["max_input"] == 208
    assert config_of(tmp_path / "adapted")["max_input"] == 208
    assert config_of(run)["max_input"] == 48


def test_scoring_with_other_lengths_keeps_the_type_and_the_prompts_of_the_run(
    place: Path, tmp_path: Path
) -> None:
    data, run = write(tmp_path / "suite"), tmp_path / "run"
    main(arguments(place, data, run, "--tasks", "long", "--dtype", "bfloat16", "--prompt", "plain"))
    base, kind = base_of(run, limits=Reading(max_input=208))
    assert base.dtype == torch.bfloat16
    assert (kind.max_input, kind.max_target) == (208, config_of(run)["max_target"])
    assert kind.prompting.way == "plain"


def test_a_resumed_run_keeps_its_lengths(place: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    main(train_arguments(place, str(run)))
    (run / "metrics.json").unlink()
    given = train_arguments(place, str(run), "--resume")
    for name in ("--max-input", "--max-target"):
        at = given.index(name)
        del given[at : at + 2]
    main(given)
    assert f"--max-input is 32: the run in {run} was started with it" in capsys.readouterr().out


def test_a_limit_that_is_given_stays_and_a_dry_run_says_the_other(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = write(tmp_path / "suite")
    plan = arguments(place, data, tmp_path / "run", "--max-target", "30", "--dry-run", "--json")
    with pytest.warns(UserWarning, match="max_input"):
        main(plan)
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert (document["max_input"], document["max_target"]) == (48, 30)
    assert "--max-target is" not in shown.err
    assert not (tmp_path / "run").exists()


def test_a_base_model_alone_is_scored_with_the_lengths_of_what_it_is_scored_on(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    data, out = write(tmp_path / "suite"), tmp_path / "scores.json"
    given = ["evaluate", "--model", str(place / "base"), "--data", str(data), "--tasks", "long"]
    main([*given, "--out", str(out)])
    assert "--max-input is 48: 95 %" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["max_input"], found["max_target"]) == (48, 32)


def test_no_more_is_chosen_than_memory_and_the_base_model_have_room_for(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = write(tmp_path / "suite")
    rows = [{"instruction": "", "input": "l" * 1500, "target": "t" * 300, "choices": None,
             "split": "train"}]  # fmt: skip
    (data / "huge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="max_target, which is 256"):
        main(arguments(place, data, tmp_path / "run", "--tasks", "huge", "--dry-run"))
    said = capsys.readouterr().out
    assert "--max-input is 1024, the most that is chosen: 95 %" in said
    assert "at most 1,501 tokens; give --max-input to read more" in said


def test_a_decoder_keeps_room_for_its_prompts(tmp_path: Path, capsys: Capture) -> None:
    model, tokenizer = llama(64)
    suite = open_suite(write(tmp_path / "suite"))
    kind, reading, given = settled_lengths(
        model, kind_of(model, tokenizer), Reading(), Given(), Measured(suite, ["long"], "train")
    )
    assert reading.max_input + reading.max_target == 64
    assert (kind.max_input, kind.max_target) == (reading.max_input, reading.max_target)
    assert given.recorded == {"max_input": reading.max_input, "max_target": reading.max_target}
    assert "as the base model has no more room" in capsys.readouterr().out


@pytest.mark.parametrize(("max_input", "max_target"), [(50, 14), (20, 32), (100, 32)])
def test_targets_get_what_a_given_limit_of_prompts_leaves(
    max_input: int, max_target: int, tmp_path: Path
) -> None:
    model, tokenizer = llama(64)
    suite = open_suite(write(tmp_path / "suite"))
    measured = Measured(suite, ["long"], "train")
    reading = Reading(max_input=max_input)
    _, found, _ = settled_lengths(model, kind_of(model, tokenizer), reading, Given(), measured)
    assert found.max_target == max_target  # of 64 positions; half if nothing is left
