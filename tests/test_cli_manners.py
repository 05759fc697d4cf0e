"""How the command line behaves towards people, programs, shells and logs."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands_run import Capture, adapt, document, ended, read, refused, reproduction
from reproduce_data import write_base as write_gated_base
from reproduce_data import write_suite as write_small_suite
from tiny_runs import train_arguments

import polyroute.host.progress as progress
import polyroute.program.commands.inspect as inspecting
import polyroute.program.commands.training as training
from polyroute.adapting.memory import bytes_in_training
from polyroute.exchange import READ, WRITTEN
from polyroute.program.cli.app import main

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def program(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


# Shells and help.


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from polyroute.program.cli.app import main; "
        "main(['train', '--help']); main(['adapt', '--help']); main(['--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib', 'tqdm'}; "
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = program(code)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")
    for word in ("--json", "--dry-run", "--verbose", "130 ended by Ctrl-C"):
        assert word in " ".join(done.stdout.split())


COMPLETE = (
    "import sys; sys.argv[0] = 'polyroute'; from polyroute.program.cli.app import main; main()"
)


@pytest.mark.parametrize(
    ("shell", "line", "expected"),
    [
        ("bash", "polyroute train --method ", {"mhr", "poly", "shared", "private"}),
        ("zsh", "polyroute train --recipe paper-", {"paper-t0", "paper-superni"}),
        ("fish", "polyroute adapt RUN --phase mu", {"mu", "mu-uncollapsed"}),
        ("bash", "polyroute reproduce ", {"suite", "superni", "t0"}),
        ("bash", "polyroute inspect RUN --j", {"--json"}),
        ("bash", "polyroute export RUN --format ", set(WRITTEN)),
        ("bash", "polyroute import SOURCE --format ", {*READ, "library"}),
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


def test_a_warning_is_one_line_without_its_place_in_the_source(place: Path) -> None:
    arguments = [
        "evaluate", "--model", str(place / "base"), "--data", str(place / "suite"),
        "--max-input", "2", "--out", str(place / "cut.json"),
    ]  # fmt: skip
    done = program(f"from polyroute.program.cli.app import main; main({arguments!r})")
    [line] = [line for line in done.stderr.splitlines() if "too long" in line]
    assert line.startswith("polyroute: warning: ")


# Exit codes, quiet, verbose.


def test_what_nobody_expected_is_one_sentence_and_code_1(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a thing\nbroke.")

    monkeypatch.setattr(inspecting, "describe_checkpoint", broken)
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

    monkeypatch.setattr(training._ShowProgress, "on_step_end", look)
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


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    write_gated_base(place / "gated")
    write_small_suite(place / "small")
    return place


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
    del description["sha256"]
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
