"""How the command line behaves towards people, programs, shells, logs and signals."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduce_data import write_base as write_gated_base
from reproduce_data import write_suite as write_small_suite
from safetensors.torch import load_file
from tiny_runs import train_arguments

import polyroute.adapting.loop as slot_training
import polyroute.demo.main as demo
import polyroute.host.progress as progress
import polyroute.program.commands as commands
from polyroute.adapting.memory import bytes_in_training
from polyroute.exchange import READ, WRITTEN
from polyroute.host.interrupts import deferred
from polyroute.program.cli import main
from polyroute.study.evaluate import TaskScore


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C works here and in children, also where a shell runs the tests in the background."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


Capture = pytest.CaptureFixture[str]
PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
FILES = ("inventory.safetensors", "routes-00000-of-00001.safetensors")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def document(arguments: list[str], capsys: Capture) -> Any:
    capsys.readouterr()
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(str(stop.value.code))


def refused(arguments: list[str], capsys: Capture) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    assert ended(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("polyroute: error: ")
    assert error.count("\n") == 1
    return error


def adapt(place: Path, run: Path, out: str, *extra: str) -> list[str]:
    return [
        "adapt", str(run), "--data", str(place / "suite"), "--tasks", "first,pick", "--shots", "8",
        "--phase", "full", "--seeds", "0,1", "--steps", "12", "--batch-size", "4",
        "--optimizer", "sgd", "--lr", "0.05", "--out", str(place / out), *extra,
    ]  # fmt: skip


def program(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


# Shells and help.


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from polyroute.program.cli import main; main(['train', '--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib', 'tqdm'}; "
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = program(code)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")
    for word in ("--json", "--dry-run", "--verbose", "130 ended by Ctrl-C"):
        assert word in " ".join(done.stdout.split())


COMPLETE = "import sys; sys.argv[0] = 'polyroute'; from polyroute.program.cli import main; main()"


@pytest.mark.parametrize(
    ("shell", "line", "expected"),
    [
        ("bash", "polyroute train --method ", {"mhr", "poly", "shared", "private"}),
        ("zsh", "polyroute train --recipe paper-", {"paper-t0", "paper-superni"}),
        ("fish", "polyroute adapt RUN --phase mu", {"mu", "mu-uncollapsed"}),
        ("bash", "polyroute reproduce ", {"suite", "superni", "t0"}),
        ("bash", "polyroute inspect RUN --j", {"--json"}),
        ("bash", "polyroute export RUN --format ", set(WRITTEN)),
        ("bash", "polyroute import SOURCE --format ", set(READ)),
    ],
)
def test_shells_complete_options_and_their_values(
    shell: str, line: str, expected: set[str]
) -> None:
    given = (
        {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        if shell == "bash"
        else {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )
    done = program(COMPLETE, _POLYROUTE_COMPLETE=f"complete_{shell}", **given)
    assert expected == set(re.findall(r"[\w-]+", done.stdout)) - {"_arguments", "_describe"}


# JSON.


def test_train_and_adapt_print_one_document(place: Path, run: Path, capsys: Capture) -> None:
    trained = document(train_arguments(place, "json"), capsys)
    metrics = read(place / "json" / "metrics.json")
    del metrics["log"]
    assert trained == {
        "out": str(place / "json"), "tasks": ["back", "copy", "upper"], **metrics,
    }  # fmt: skip
    adapted = document(adapt(place, run, "json-adapt", "--grid", "steps=1,2"), capsys)
    assert adapted["results"] == read(place / "json-adapt" / "results.json")
    scores = [r["score"] for r in adapted["results"] if r["label"] == "steps=2"]
    assert [mean["label"] for mean in adapted["means"]] == ["steps=1", "steps=2"]
    assert adapted["means"][1]["score"] == pytest.approx(sum(scores) / 4, abs=1e-12)


def test_evaluate_export_import_and_report_print_one_document(
    place: Path, run: Path, capsys: Capture
) -> None:
    path = place / "scores.json"
    data = ["--data", str(place / "suite")]
    scored = document(["evaluate", str(run), *data, "--zero-shot", "--out", str(path)], capsys)
    assert scored == {"out": str(path), **read(path)}
    lora = place / "json-lora"
    given = ["export", str(run), "--task", "copy", "--out", str(lora)]
    assert document(given, capsys) == {"out": str(lora), "format": "peft", "task": "copy"}
    main(["export", str(run), "--format", "peft-poly", "--out", str(place / "poly")])
    given = [
        "import", str(place / "poly"), "--model", str(place / "base"), "--out",
        str(place / "imported"),
    ]  # fmt: skip
    imported = document(given, capsys)
    assert imported["out"] == str(place / "imported")
    assert (
        imported["parameters"]["inventory"] == read(run / "metrics.json")["parameters"]["inventory"]
    )
    page = place / "json.html"
    shown = document(["report", str(run), "--out", str(page)], capsys)
    assert shown == {"out": str(page), "files": str(place / "json-files")}


def test_inspect_prints_what_the_analysis_found(place: Path, run: Path, capsys: Capture) -> None:
    found = document(["inspect", str(run)], capsys)
    assert found["tasks"] == ["back", "copy", "upper"]
    assert (found["skills"], found["sites"], found["base"]["class"]) == (
        3, 16, "T5ForConditionalGeneration",
    )  # fmt: skip
    assert sum(found["routing"]["overall_usage"]) == pytest.approx(1, abs=1e-6)
    assert found["routing"]["relation"] is None


def test_the_switches_also_stand_before_the_command(run: Path, capsys: Capture) -> None:
    main(["--json", "inspect", str(run)])
    first = json.loads(capsys.readouterr().out)
    assert first == document(["inspect", str(run)], capsys)
    main(["inspect", str(run)])  # and are forgotten afterwards
    assert capsys.readouterr().out.startswith("mhr lora")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "no-such-run", "--json"], "no-such-run"),
        (["inspect", "--json"], "see `"),
        (["inspect", "run", "--no-such-option"], "--no-such-option"),
        (["trian"], "train"),
        (["train", "--steps", "many", "--data", "d", "--out", "o"], "--steps"),
    ],
)
def test_errors_are_one_sentence_and_code_2(
    arguments: list[str], sentence: str, capsys: Capture
) -> None:
    assert sentence in refused(arguments, capsys)


# Exit codes, quiet, verbose.


def test_what_nobody_expected_is_one_sentence_and_code_1(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a thing\nbroke.")

    monkeypatch.setattr(commands, "describe_checkpoint", broken)
    assert ended(["inspect", str(run)]) == 1
    expected = "polyroute: failed: RuntimeError (a thing broke); --verbose shows where\n"
    assert capsys.readouterr().err == expected
    assert ended(["inspect", str(run), "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_quiet_prints_results_alone(place: Path, run: Path, capsys: Capture) -> None:
    main(adapt(place, run, "quiet", "--quiet", "--steps", "1"))
    out, error = capsys.readouterr()
    assert error == ""
    assert "mean over tasks" in out
    assert "sgd, lr" not in out  # a note, which is there without
    main(adapt(place, run, "loud", "--steps", "1"))
    assert "sgd, lr" in capsys.readouterr().out


# Progress.


def test_in_a_log_progress_is_whole_lines(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    main(train_arguments(place, "log"))
    main(adapt(place, place / "log", "log-adapt"))
    error = capsys.readouterr().err
    assert not {"\r", "\x1b"} & set(error)
    line = r"training: 7 of 12 steps, +[\d.]+(step/s|s/step), [\d:]+ left, loss [\d.]+"
    assert re.search(f"^{line}$", error, re.MULTILINE), error
    assert re.search(
        r"^adapting: \d+ of 48 steps, .* left, 0 of 4 slots done$", error, re.MULTILINE
    )


def test_a_short_wait_says_nothing_in_a_log(capsys: Capture) -> None:
    assert list(progress.progress(range(3), "waiting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.progress(what="waiting", total=3) as bar:
        bar.delay = 0.0
        bar.refresh()
        assert "\rwaiting:" in sys.stderr.getvalue()  # type: ignore[attr-defined]


# Plans.


def test_a_dry_run_of_train_says_what_the_run_then_does(place: Path, capsys: Capture) -> None:
    arguments = train_arguments(place, "planned", "--cap", "22", "--accumulation", "2")
    plan = document([*arguments, "--dry-run"], capsys)
    assert not (place / "planned").exists()
    main(arguments)
    metrics = read(place / "planned" / "metrics.json")
    for name in ("parameters", "trained_parameters", "steps"):
        assert plan[name] == metrics[name]
    assert (plan["examples_per_step"], plan["examples"]) == (16, 192)
    assert [row["seen"] for row in plan["tasks"]] == [64.0] * 3
    written = {p.name for p in (place / "planned").iterdir() if p.is_file()}
    assert written == {name.replace("*", "00000-of-00001") for name in plan["writes"]} - {
        next(name for name in plan["writes"] if name.startswith("checkpoint"))
    }
    assert "activations come on top" in shown([*arguments, "--dry-run", "--overwrite"], capsys)


def shown(arguments: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    main(arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_estimate_of_memory_is_what_training_then_holds(
    place: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, int] = {}

    def look(_: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        states = given["optimizer"].state.values()
        tensors = [t for s in states for k, t in s.items() if k != "step"]
        trained = [p for p in given["model"].parameters() if p.requires_grad]
        held["optimizer_state"] = sum(t.numel() * t.element_size() for t in tensors)
        held["gradients"] = sum(p.numel() * p.element_size() for p in trained)
        estimate = bytes_in_training(given["model"], optimizer == "adafactor")
        assert estimate["gradients"] == held["gradients"]
        assert estimate["optimizer_state"] == pytest.approx(held["optimizer_state"], rel=0.1)

    monkeypatch.setattr(commands._ShowProgress, "on_step_end", look)
    main(train_arguments(place, f"held-{optimizer}", "--optimizer", optimizer, "--steps", "1"))
    assert held


def test_a_dry_run_of_adapt_says_what_the_run_then_does(
    place: Path, run: Path, capsys: Capture
) -> None:
    arguments = adapt(place, run, "planned-adapt")
    plan = document([*arguments, "--dry-run"], capsys)
    assert not (place / "planned-adapt").exists()
    main(arguments)
    results = read(place / "planned-adapt" / "results.json")
    assert (plan["slots"], plan["slots_at_a_time"], plan["steps"]) == (4, 4, 48)
    assert {r["trained_parameters"] for r in results} == {plan["trained_parameters"]}
    assert {r["shots"] for r in results} == {row["shots"] for row in plan["tasks"]} == {8}
    assert "nothing was written" in shown([*arguments, "--dry-run", "--overwrite"], capsys)
    assert results == read(place / "planned-adapt" / "results.json")


def test_a_dry_run_finds_what_the_run_would_find(place: Path, run: Path, capsys: Capture) -> None:
    assert "does not divide" in refused(
        train_arguments(place, "x", "--dry-run", "--heads", "5"), capsys
    )
    again = train_arguments(place, "run", "--dry-run", "--resume", "--lr", "0.5")
    assert "was started with lr=0.001" in refused(again, capsys)
    assert "holds a run already" in refused(train_arguments(place, "run", "--dry-run"), capsys)


# Interruptions.


def at_step(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of training, after a step."""

    def act(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == number:
            action()

    monkeypatch.setattr(commands._ShowProgress, "on_step_end", act)


def at_slot_step(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    take_step, count = slot_training._take_step, iter(range(1, 10_000))

    def act(*given: Any) -> None:
        take_step(*given)
        if next(count) == number:
            action()

    monkeypatch.setattr(slot_training, "_take_step", act)


def equal(one: Path, other: Path, *names: str) -> None:
    for name in names or FILES:
        ours, expected = load_file(one / name), load_file(other / name)
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-5, rtol=1e-5)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def killed(arguments: list[str]) -> None:
    """Run a command in a process of its own, which has to end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            main(arguments)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_an_interrupted_training_goes_on_to_the_same_end(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    out = place / "interrupted"
    with monkeypatch.context() as patch:
        at_step(7, send(signal.SIGINT), patch)
        assert ended(train_arguments(place, out.name)) == 130
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    sentence = f"polyroute: interrupted; --resume goes on with the run in {out}"
    assert capsys.readouterr().err.splitlines()[-1] == sentence
    assert (out / "checkpoint-7").is_dir()
    assert not (out / "metrics.json").exists()
    main(train_arguments(place, out.name, "--resume"))
    equal(out, run)
    resumed, whole = (read(folder / "metrics.json") for folder in (out, run))
    # Of the last part alone; the mean loss would be that sum over the steps of all parts.
    alone = {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert whole.keys() - resumed.keys() == alone
    assert not any(entry.keys() & alone for entry in resumed["log"])


def test_interrupted_adaptations_are_saved_and_go_on_to_the_same_end(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    main(adapt(place, run, "adapt-whole"))
    with monkeypatch.context() as patch:
        at_slot_step(5, send(signal.SIGTERM), patch)
        assert ended(adapt(place, run, "adapt-stopped")) == 143
    assert "--resume goes on with the run in" in capsys.readouterr().err
    assert len(list((place / "adapt-stopped" / ".running").iterdir())) == 4
    steps: list[int] = []
    with monkeypatch.context() as patch:
        at_slot_step(7, lambda: steps.append(7), patch)
        main(adapt(place, run, "adapt-stopped", "--resume"))
    assert steps == [7]  # of twelve, five had been taken
    for task in ("first", "pick"):
        inside = f"{task}/seed-1/adapter_model.safetensors"
        equal(place / "adapt-stopped", place / "adapt-whole", inside)


def test_a_signal_to_the_program_leaves_a_run_that_goes_on(place: Path, run: Path) -> None:
    longer = ["--steps", "4000", "--save-steps", "10"]
    command = [sys.executable, "-m", "polyroute", *train_arguments(place, "signalled", *longer)]
    checkpoint = place / "signalled" / "checkpoint-10" / "trainer_state.json"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        limit = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("polyroute: interrupted; --resume goes on")


def test_a_killed_continuation_goes_on_to_the_same_end(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def onward(out: str, *extra: str) -> list[str]:
        return [
            "train", "--start", str(run), "--data", str(place / "suite"), "--phase", "full",
            "--steps", "9", "--batch-size", "8", "--save-steps", "3", "--out", str(place / out),
            *extra,
        ]  # fmt: skip

    main(onward("onward"))
    with monkeypatch.context() as patch:
        at_step(7, send(signal.SIGKILL), patch)
        killed(onward("onward-killed"))
    assert not (place / "onward-killed" / "metrics.json").exists()
    main(onward("onward-killed", "--resume"))
    equal(place / "onward-killed", place / "onward")


def reproduction(place: Path, out: str, *extra: str) -> list[str]:
    settings = {
        "train.steps": 6, "train.bf16": False, "train.max-input": 32, "train.max-target": 4,
        "train.save-steps": 2, "adapt.steps": 4, "adapt.validation-shots": 2, "shots": 4,
        "seeds": [0], "methods.mhr.train.heads": 4, "methods.mhr.phases": ["z"],
    }  # fmt: skip
    pairs = [part for k, v in settings.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    return [
        "reproduce", "suite", "--model", str(place / "gated"), "--data", str(place / "small"),
        "--methods", "mhr", "--out", str(place / out), *pairs, *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    write_gated_base(place / "gated")
    write_small_suite(place / "small")
    return place


def test_a_reproduction_killed_and_interrupted_comes_to_the_same_end(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plan = document(reproduction(small, "whole", "--dry-run"), capsys)
    assert not (small / "whole").exists()
    assert [stage["command"] for stage in plan["stages"]] == ["train", "evaluate", "adapt"]
    whole = document(reproduction(small, "whole"), capsys)
    assert whole == {"out": str(small / "whole"), **read(small / "whole" / "results.json")}
    with monkeypatch.context() as patch:
        at_step(3, send(signal.SIGKILL), patch)
        killed(reproduction(small, "stopped"))
    with monkeypatch.context() as patch:
        at_slot_step(2, send(signal.SIGINT), patch)
        assert ended(reproduction(small, "stopped", "--resume")) == 130
    sentence = f"polyroute: interrupted; --resume goes on with the run in {small / 'stopped'}"
    assert capsys.readouterr().err.splitlines()[-1] == sentence
    plan = document(reproduction(small, "stopped", "--resume", "--dry-run"), capsys)
    assert [stage["is_done"] for stage in plan["stages"]] == [True, True, False]
    stopped = document(reproduction(small, "stopped", "--resume"), capsys)
    assert stopped["results"] == whole["results"]
    equal(small / "stopped" / "mhr", small / "whole" / "mhr")


def test_an_interrupted_demo_goes_on_after_the_methods_that_are_done(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    done: list[str] = []

    def train(_: Any, model: Any) -> float:
        done.append(model.adapter_config.method)
        if done == ["shared", "poly"]:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    def adapt_all(_: Any, base: Any, method: str) -> list[dict[str, Any]]:
        return [
            {"method": method, "phase": phase, "task": task, "seed": 0, "score": 0.5,
             "trained_parameters": 1, "seconds": 1.0}
            for phase in demo.PHASES[method] for task in ("one", "two")
        ]  # fmt: skip

    monkeypatch.setattr(demo._Demo, "train", train)
    monkeypatch.setattr(demo._Demo, "adapt", adapt_all)
    monkeypatch.setattr(
        demo, "evaluate", lambda *_, **__: [TaskScore("t", "m", 1.0, *[None] * 3, 1)]
    )
    arguments = ["demo", "--quick", "--out", str(place / "demo")]
    assert ended(arguments) == 130
    assert "--resume goes on with the run in" in capsys.readouterr().err
    found = document([*arguments, "--resume"], capsys)
    assert done == ["shared", "poly", "poly", "mhr"]
    assert list(found["multi_task"]) == ["shared", "poly", "mhr"]
    assert len(found["adaptations"]) == 2 * 7
    assert found["summary"][0]["accuracy"] == 0.5


def test_signals_wait_for_the_end_of_a_block_and_then_take_effect() -> None:
    seen = []

    def interrupted(times: int) -> None:
        with deferred() as is_stopped:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
                seen.append(is_stopped())

    with pytest.raises(KeyboardInterrupt):
        interrupted(1)
    assert seen == [True]
    with pytest.raises(KeyboardInterrupt):
        interrupted(2)  # the second does not wait
    assert seen == [True, True]


# The page.


def test_the_commands_of_the_page_run(
    place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mhr").symlink_to(run)
    (tmp_path / "SUITE").symlink_to(place / "suite")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^polyroute (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        arguments = shlex.split(line.replace("--model demo", f"--model {place / 'base'}"))
        if arguments[-1] == "--resume":
            arguments += ["--steps", "1"]
            main([given for given in arguments if given != "--resume"])
        main(arguments)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mhr", "new"]


# What used to end later, or badly.


def test_a_score_that_tasks_lack_is_refused_before_anything_runs(
    small: Path, capsys: Capture
) -> None:
    roles = read(small / "small" / "roles.json")
    other = small / "without-choices"
    shutil.copytree(small / "small", other)
    roles["first"] |= {"metric": "exact_match"}
    (other / "roles.json").write_text(json.dumps(roles))
    arguments = reproduction(small, "lacking", "--set", "score=score_normalised")
    arguments[arguments.index("--data") + 1] = str(other)
    assert "has no score_normalised" in refused(arguments, capsys)
    assert not (small / "lacking").exists()


def test_a_config_cannot_change_what_a_start_has(place: Path, run: Path, capsys: Capture) -> None:
    config = place / "start.yaml"
    config.write_text("rank: 8\n")
    arguments = [
        "train", "--start", str(run), "--data", str(place / "suite"), "--out", str(place / "x"),
        "--config", str(config),
    ]  # fmt: skip
    assert "rank in " in refused(arguments, capsys)
    config.write_text("steps: 1\n")
    main([*arguments, "--dry-run"])


@pytest.mark.parametrize(("name", "value"), [("max_input", "text"), ("model", 3), ("dtype", None)])
def test_a_description_edited_by_hand_is_damaged(
    place: Path, run: Path, tmp_path: Path, name: str, value: Any, capsys: Capture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    description = read(copy / "run.json")
    description["config"][name] = value
    (copy / "run.json").write_text(json.dumps(description))
    command = ["evaluate", str(copy), "--data", str(place / "suite")]
    assert f"run.json is damaged: {name} is {value!r}" in refused(command, capsys)


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_readers_of_suites_take_options(
    place: Path, run: Path, command: str, capsys: Capture
) -> None:
    arguments = [command, str(run), "--data", str(place / "suite"), "--reader", "nonsense=1"]
    extra = ["--out", str(place / "reader.html")] if command == "report" else []
    assert "has no option 'nonsense'" in refused([*arguments, *extra], capsys)
