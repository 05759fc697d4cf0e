"""Commands run inside the tests' own process, and what they printed and ended with."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from polyroute.program.cli.app import main

Capture = pytest.CaptureFixture[str]


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


@contextmanager
def forked(arguments: list[str]) -> Iterator[int]:
    """Run a command in a process of its own, which gets SIGKILL at the end of the block.

    A fork spares the child the imports, which take longer than the commands of these tests.
    """
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            main(arguments)
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the command ended before it was killed"


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.005)


def adapt(place: Path, run: Path, out: str, *extra: str) -> list[str]:
    return [
        "adapt", str(run), "--data", str(place / "suite"), "--tasks", "first,pick", "--shots", "8",
        "--phase", "full", "--seeds", "0,1", "--steps", "12", "--batch-size", "4",
        "--optimizer", "sgd", "--lr", "0.05", "--out", str(place / out), *extra,
    ]  # fmt: skip


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
