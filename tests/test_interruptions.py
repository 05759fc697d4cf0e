"""Signals, and how runs go on after them."""

import os
import pty
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
from commands_run import Capture, adapt, document, ended, read, reproduction
from reproduce_data import write_base as write_gated_base
from reproduce_data import write_suite as write_small_suite
from safetensors.torch import load_file
from tiny_runs import train_arguments

import polyroute.adapting.loop as slot_training
import polyroute.demo.main as demo
import polyroute.program.commands.training as training
from polyroute.host.interrupts import deferred
from polyroute.program.cli.app import main
from polyroute.study.evaluate import TaskScore

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
FILES = ("inventory.safetensors", "routes-00000-of-00001.safetensors")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGHUP work here and in children, also in the background and under nohup."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    write_gated_base(place / "gated")
    write_small_suite(place / "small")
    return place


def at_step(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of training, after a step."""

    def act(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == number:
            action()

    monkeypatch.setattr(training._ShowProgress, "on_step_end", act)


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
    assert resumed.keys() == whole.keys()
    assert untimed(resumed) == untimed(whole)
    assert [untimed(e) for e in resumed["log"]] == [untimed(e) for e in whole["log"]]
    assert all(resumed[name] > 0 for name in TIMES)


def test_a_training_killed_after_its_last_step_says_all_of_it(place: Path, run: Path) -> None:
    out = Path(shutil.copytree(run, place / "almost"))
    whole = read(out / "metrics.json")
    (out / "metrics.json").unlink()
    main(train_arguments(place, out.name, "--resume"))
    resumed = read(out / "metrics.json")
    assert resumed.keys() == whole.keys()
    assert untimed(resumed) == untimed(whole)
    assert [untimed(e) for e in resumed["log"]] == [untimed(e) for e in whole["log"]]


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in {*TIMES, "log"}}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_asks_for_an_end_leaves_a_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    before = signal.getsignal(number)
    out = tmp_path / "asked"
    with monkeypatch.context() as patch:
        at_step(3, send(number), patch)
        assert ended([*train_arguments(place, "x"), "--out", str(out)]) == code
    assert (out / "checkpoint-3").is_dir()
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with monkeypatch.context() as patch:
            at_step(3, send(signal.SIGHUP), patch)
            main([*train_arguments(place, "x"), "--out", str(tmp_path / "on")])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "on" / "metrics.json").exists()


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


def test_a_terminal_that_is_closed_leaves_a_run_that_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "hung-up"
    longer = ["--out", str(out), "--steps", "4000", "--save-steps", "10"]
    child, terminal = pty.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            main([*train_arguments(place, "x"), *longer])
        except SystemExit as stop:
            os._exit(int(str(stop.code)))
        finally:
            os._exit(1)
    wait_for((out / "checkpoint-10" / "trainer_state.json").is_file)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    last = max(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    assert last % 10 or last > 10
    assert not (out / "metrics.json").exists()


def wait_for(is_so: Callable[[], bool]) -> None:
    for _ in range(1200):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened for a minute")


def test_a_disk_that_is_full_within_a_checkpoint_ends_in_a_sentence(place: Path, run: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoint-12").iterdir()}
    largest = sizes.pop("optimizer.pt")
    room = (max(sizes.values()) + largest) // 2
    words = train_arguments(place, "no-space")
    limited = f"ulimit -f {room // 1024}; exec {shlex.join([sys.executable, '-m', 'polyroute'])} "
    ended = subprocess.run(
        ["bash", "-c", limited + shlex.join(words)], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "cannot be written whole" in ended.stderr.splitlines()[-1]
    main([*words, "--resume"])
    equal(place / "no-space", run)
