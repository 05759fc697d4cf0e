"""Adapting SmolLM2: one run of nine slots against nine runs of one, for `smollm2.py`.

Three tasks and three seeds, 16 examples in each step. "Commands" are whole runs of `polyroute
adapt`: starting Python, loading, reading, training, scoring and writing. "Training" is
`adapt_many` in one process that has loaded everything, so nothing is saved but what slots share
while they train.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polyroute
from polyroute.build import from_checkpoint
from polyroute.data.open import open_suite
from polyroute.program.commands.runs import base_of
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.study.examples import encoded

__all__ = ["measured"]

TASKS = ("bbh_hyperbaton", "bbh_boolean_expressions", "bbh_disambiguation_qa")
TRAINED = "arc_easy,boolq"
SEEDS = (42, 1024, 0)
SHOTS = 16
ONE, NINE = "one run of nine", "nine runs of one"


def measured(data: str, steps: int, rounds: int, threads: int, dtype: str) -> dict[str, Any]:
    """CPU seconds and seconds by the clock of both ways, commands and training, in turns."""
    with TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "adapted"
        _command(
            threads, "train", "--model", "smollm2", "--dtype", dtype, "--data", data,
            "--tasks", TRAINED, "--steps", "1", "--batch-size", "4", "--skills", "8",
            "--heads", "8", "--rank", "4", "--out", str(run),
        )  # fmt: skip
        training = _training(run, data, steps)

        def commands(tasks: tuple[str, ...], seeds: tuple[int, ...]) -> None:
            _command(
                threads, "adapt", str(run), "--data", data, "--tasks", ",".join(tasks),
                "--shots", str(SHOTS), "--steps", str(steps), "--phase", "mu",
                "--seeds", ",".join(map(str, seeds)), "--out", str(out), "--overwrite",
            )  # fmt: skip

        contenders = {
            f"{what}, {way}": (call, way)
            for what, call in (("commands", commands), ("training", training))
            for way in (NINE, ONE)
        }
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        clock: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds):
            for name in contenders if number % 2 == 0 else reversed(contenders):
                call, way = contenders[name]
                before = time.perf_counter(), _spent()
                _adapt(call, way)
                clock[name].append(time.perf_counter() - before[0])
                cpu[name].append(_spent() - before[1])
    return {
        "steps": steps, "shots": SHOTS, "tasks": TASKS, "seeds": SEEDS,
        "cpu_seconds": cpu, "clock_seconds": clock,
    }  # fmt: skip


def _adapt(call: Callable[[tuple[str, ...], tuple[int, ...]], None], way: str) -> None:
    if way == ONE:
        call(TASKS, SEEDS)
    else:
        for task in TASKS:
            for seed in SEEDS:
                call((task,), (seed,))


def _spent() -> float:
    """CPU seconds of this process and of those that it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _command(threads: int, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "polyroute", "--quiet", *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True)


def _training(
    run: Path, data: str, steps: int
) -> Callable[[tuple[str, ...], tuple[int, ...]], None]:
    base, kind = base_of(run)
    model = from_checkpoint(base, read_checkpoint(run), str(run))
    suite = open_suite(data)
    rows = {task: encoded(suite, task, "train", kind) for task in TASKS}

    def train(tasks: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        polyroute.adapt_many(
            model, {task: rows[task] for task in tasks}, kind=kind, phase="mu", seeds=seeds,
            shots=SHOTS, steps=steps,
        )  # fmt: skip

    return train
