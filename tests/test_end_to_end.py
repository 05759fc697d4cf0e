"""The program as a user runs it: commands on a small suite, with tiny base models."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from commands_run import forked, wait_for
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import train_arguments
from transformers import AutoModelForSeq2SeqLM

import polyroute as pr
import polyroute.adapting.loop as loop
import polyroute.host.progress as progress
from polyroute.program.cli.app import main


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_describes_itself(run: Path, place: Path) -> None:
    description = read(run / "run.json")
    assert description["config"]["tasks"] == ["back", "copy", "upper"]
    assert description["config"]["seed"] == 0
    assert description["machine"]["versions"]["torch"] == version("torch")
    assert read(run / "metrics.json")["steps"] == 12


def test_checkpoints_hold_the_inventory_and_not_the_base(run: Path) -> None:
    names = {path.name for path in (run / "checkpoint-12").iterdir()}
    assert {"inventory.safetensors", "routes-00000-of-00001.safetensors", "polyroute.json"} <= names
    assert "model.safetensors" not in names
    assert (
        load_file(run / "checkpoint-12" / "routes-00000-of-00001.safetensors")["rows"].shape[0] == 3
    )


def test_a_run_loads_from_python(run: Path, place: Path) -> None:
    base = AutoModelForSeq2SeqLM.from_pretrained(place / "base")
    model = pr.from_pretrained(base, run)
    assert model.tasks == ("back", "copy", "upper")
    assert model.generate(torch.tensor([[5, 6]]), tasks="copy", max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("phase", ["z", "mu", "mu-uncollapsed", "full", "random"])
def test_adapting_reduces_the_loss_and_keeps_a_record(run: Path, place: Path, phase: str) -> None:
    out = place / f"adapt-{phase}"
    main(
        ["adapt", str(run), "--data", str(place / "suite"), "--tasks", "first", "--shots", "16",
         "--phase", phase, "--seeds", "0,1", "--steps", "30", "--lr", "1e-2", "--route-lr", "1",
         "--out", str(out)]
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert [r["seed"] for r in results] == [0, 1]
    for result in results:
        assert len(set(result["indices"])) == 16
        assert result["last_loss"] < result["first_loss"]
    assert results[0]["indices"] != results[1]["indices"]
    model = pr.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(place / "base"), run)
    counts = model.counts()
    expected = {
        "z": counts["new_task_z"],
        "mu": counts["one_adapter"],
        "mu-uncollapsed": counts["inventory"],
    }.get(phase, counts["new_task_full"])
    assert results[0]["trained_parameters"] == expected
    base = AutoModelForSeq2SeqLM.from_pretrained(place / "base")
    PeftModel.from_pretrained(base, out / "first" / "seed-0")


def test_training_by_rows_resumes_and_differs_from_training_the_whole_table(
    run: Path, place: Path
) -> None:
    arguments = train_arguments(place, "rowwise", "--rowwise", "--save-steps", "6")
    main(arguments)
    rows = place / "rowwise" / "routes-00000-of-00001.safetensors"
    end = load_file(rows)["rows"]
    assert not torch.equal(end, load_file(run / rows.name)["rows"])
    (place / "rowwise" / "metrics.json").unlink()
    shutil.rmtree(place / "rowwise" / "checkpoint-12")
    main([*arguments, "--resume"])
    torch.testing.assert_close(load_file(rows)["rows"], end, atol=1e-6, rtol=1e-5)


def test_evaluating_trained_and_held_out_tasks(run: Path, place: Path) -> None:
    main(["evaluate", str(run), "--data", str(place / "suite")])
    report = read(run / "evaluate-test.json")
    assert [t["task"] for t in report["tasks"]] == ["back", "copy", "upper"]
    main(["evaluate", str(run), "--data", str(place / "suite"), "--zero-shot"])
    report = read(run / "evaluate-zero-shot-test.json")
    by_name = {t["task"]: t for t in report["tasks"]}
    assert by_name["pick"]["chance"] == 0.5
    assert by_name["pick"]["metric"] == "accuracy"
    assert by_name["first"]["metric"] == "exact_match"


def test_an_exported_task_answers_as_the_routed_one(run: Path, place: Path) -> None:
    main(["export", str(run), "--task", "upper", "--out", str(place / "lora")])
    load = AutoModelForSeq2SeqLM.from_pretrained
    lora = PeftModel.from_pretrained(load(place / "base"), place / "lora").eval()
    routed = pr.from_pretrained(load(place / "base"), run).eval()
    batch = {"input_ids": torch.arange(10, 22).view(2, 6), "labels": torch.arange(8).view(2, 4)}
    with torch.no_grad():
        expected = routed(**batch, tasks="upper").logits
        torch.testing.assert_close(lora(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_inspecting_needs_no_base_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(run)])
    printed = capsys.readouterr().out
    assert "3 skills" in printed
    assert "nearest task by route" in printed


def test_a_killed_run_resumes_to_the_same_end(place: Path) -> None:
    longer = ["--steps", "100", "--save-steps", "10"]
    main(train_arguments(place, "whole", *longer))
    whole, killed = place / "whole", place / "killed"
    with forked(train_arguments(place, "killed", *longer)):
        wait_for((killed / "checkpoint-20" / "trainer_state.json").exists)
    assert not (killed / "metrics.json").exists()
    losses = [entry["loss"] for entry in read(whole / "metrics.json")["log"] if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    main(train_arguments(place, "killed", *longer, "--resume"))
    for name in ("inventory.safetensors", "routes-00000-of-00001.safetensors"):
        ours, expected = load_file(killed / name), load_file(whole / name)
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-5)


def test_adapting_resumes_where_it_stopped(run: Path, place: Path) -> None:
    out = place / "adapt-twice"
    arguments = [
        "adapt", str(run), "--data", str(place / "suite"), "--tasks", "first,pick", "--shots", "8",
        "--phase", "z", "--seeds", "0", "--steps", "3", "--out", str(out),
    ]  # fmt: skip
    main(arguments)
    whole = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(whole[:1]))
    main([*arguments, "--resume"])
    again = json.loads((out / "results.json").read_text())
    assert again[0] == whole[0]
    assert again[1]["indices"] == whole[1]["indices"]
    assert again[1]["score"] == whole[1]["score"]
    assert again[1]["last_loss"] == pytest.approx(whole[1]["last_loss"], rel=1e-5)


def test_adapting_scores_some_examples_of_each_task_where_that_is_asked(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["adapt", str(run), "--data", str(place / "suite"), "--shots", "4", "--steps", "1",
             "--seeds", "0", "--max-test", "2", "--out", str(place / "some")]  # fmt: skip
    main([*given, "--dry-run", "--json"])
    assert {row["scored_on"] for row in json.loads(capsys.readouterr().out)["tasks"]} == {2}
    main(given)
    results = read(place / "some" / "results.json")
    assert results
    assert {result["examples"] for result in results} == {2}


def test_adapting_tells_each_result_as_it_ends_with_both_scores(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    capsys.readouterr()
    main(
        ["adapt", str(run), "--data", str(place / "suite"), "--tasks", "first,pick", "--shots", "8",
         "--phase", "z", "--seeds", "0,1", "--steps", "2", "--out", str(place / "adapt-told")]
    )  # fmt: skip
    out, error = capsys.readouterr()
    results = read(place / "adapt-told" / "results.json")
    for result in results:
        scores = f"{result['metric']} {result['score']:.3f}"
        if result["score_normalised"] is not None:
            scores += f", {result['score_normalised']:.3f} per token"
        assert f"{result['task']} with seed {result['seed']}: {scores}; " in out
    header, *_, means = (line for line in out.splitlines() if "task" in line)
    assert "per token" in header
    assert "mean over tasks" in means
    assert any(result["score_normalised"] is not None for result in results)
    assert "scoring first: " in error  # it does not look hung while it scores
    assert "scoring pick: " in error


def test_killed_adaptations_resume_to_the_same_end(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(out: str) -> list[str]:
        return [
            "adapt", str(run), "--data", str(place / "suite"), "--tasks", "all", "--shots", "8",
            "--phase", "full", "--seeds", "0,1", "--grid", "steps=3,40", "--batch-size", "4",
            "--optimizer", "sgd", "--lr", "0.05", "--out", str(place / out),
        ]  # fmt: skip

    def running() -> int:
        return len(list((place / "killed-adapt" / ".running").glob("*.safetensors")))

    main(arguments("whole-adapt"))
    results = place / "killed-adapt" / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
        with forked(arguments("killed-adapt")):
            # The short ones are done and the long ones are under way.
            wait_for(lambda: results.exists() and len(read(results)) == 4 and running() == 4)
    done = read(results)
    main([*arguments("killed-adapt"), "--resume"])
    assert not (place / "killed-adapt" / ".running").exists()
    expected = {
        (r["task"], r["seed"], r["label"]): r for r in read(place / "whole-adapt" / "results.json")
    }
    actual = {(r["task"], r["seed"], r["label"]): r for r in read(results)}
    assert actual.keys() == expected.keys()
    assert len(actual) == 8
    assert all(result in read(results) for result in done)  # what was finished is not done again
    for key, result in actual.items():
        assert result["indices"] == expected[key]["indices"]
        assert result["last_loss"] == pytest.approx(expected[key]["last_loss"], rel=1e-4)
        place_of = f"{key[0]}/seed-{key[1]}/{key[2]}/adapter_model.safetensors"
        ours = load_file(place / "killed-adapt" / place_of)
        for name, tensor in load_file(place / "whole-adapt" / place_of).items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_config_file_gives_defaults_and_the_command_line_wins(place: Path) -> None:
    config = place / "config.yaml"
    config.write_text("steps: 2\nrank: 1\ntasks: [copy, upper]\nbatch-size: 4\n")
    arguments = train_arguments(place, "configured")
    del arguments[arguments.index("--rank") : arguments.index("--rank") + 2]
    main([*arguments, "--config", str(config)])
    recorded = read(place / "configured" / "run.json")["config"]
    assert recorded["rank"] == 1
    assert recorded["tasks"] == ["copy", "upper"]
    assert recorded["steps"] == 12
    assert recorded["batch_size"] == 8


def broken(path: Path, line: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "coppy"], "did you mean 'copy'"),
        (["--heads", "5"], "does not divide"),
        (["--target", "nothing"], "matches no layer"),
        (["--steps", "0"], "--steps must be a positive whole number"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--rank", "0"], "rank must be a positive"),
        (["--method", "best"], "is not one of"),
        (["--model", "no/such/model/here"], "no/such/model/here"),
        (["--data", "no-such-suite"], "no-such-suite"),
        (["--tasks", "copy,copy"], "twice"),
        (["--phase", "zz"], "unknown phase"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(train_arguments(place, "bad", *arguments))
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert sentence in errors[-1]
    assert "Traceback" not in "\n".join(errors)
    assert not (place / "bad").exists()


def test_a_second_run_asks_what_to_do(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(train_arguments(place, "run"))
    assert stop.value.code == 2
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(train_arguments(place, "run", "--resume", "--seed", "7"))
    assert "started with seed=0" in capsys.readouterr().err


def test_a_task_without_examples_to_score_on_is_refused_with_the_ways_out(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.csv").write_text("input,target\n" + "q,x\n" * 8)
    given = ["adapt", str(run), "--data", str(place / "mine.csv"), "--tasks", "mine",
             "--shots", "4", "--steps", "1", "--seeds", "0"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*given, "--out", str(place / "unscored")])
    assert stop.value.code == 2
    assert (
        "task 'mine' has no 'test' split to score on: write test in a column 'split' of some rows, "
        "or score on another with --split (train, whose examples are learned)"
    ) in capsys.readouterr().err
    main([*given, "--split", "train", "--out", str(place / "scored")])
    assert read(place / "scored" / "run.json")["config"]["split"] == "train"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shots", "1000"], "1000 shots"),
        (
            ["--shots", "42", "--validation-shots", "3"],
            "task 'first' has 44 training examples, too few for 42 shots + 3 validation shots",
        ),
        (["--tasks", "copy"], "trained on"),
        (["--split", "dev"], "dev"),
        (["--phase", "zz"], "phase"),
        (["--seeds", "a"], "--seeds"),
        (["--seeds", "1,1"], "--seeds"),
    ],
)
def test_bad_adaptations_end_before_any_work(
    run: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    out = place / "bad-adapt"
    with pytest.raises(SystemExit) as stop:
        main(
            ["adapt", str(run), "--data", str(place / "suite"), "--tasks", "first", *arguments,
             "--out", str(out)]
        )  # fmt: skip
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_config_key_names_the_nearest(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place / "wrong.yaml"
    config.write_text("stepps: 3\n")
    with pytest.raises(SystemExit) as stop:
        main(train_arguments(place, "wrong", "--config", str(config)))
    assert stop.value.code == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_a_truncated_inventory_is_named(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = place / "truncated"
    copy.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    (copy / "inventory.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(copy), "--task", "copy", "--out", str(place / "x")])
    assert stop.value.code == 2
    assert "inventory.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "train", "adapt", "evaluate", "export", "inspect"])
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([command, "--help"])
    assert f"polyroute {command}" in capsys.readouterr().out
