"""Adapting many slots in one run, against the same code one slot after the other.

    python benchmarks/adapt_many.py --data ../shared/suite --run runs/real/mhr

Cases: a sentence encoder (all-MiniLM-L6-v2) on 12 held-out tasks of the real suite, 32 shots, and
the demo's T5 on its own held-out compositions; 3 seeds each, so 36 slots; several batch sizes and
phases. "Serial" is `adapt_many` called once for each slot, "many" is called once for all; both hold
the same model, loaded once. They run in turns, serial first and many first alternately, and what
both end at is compared: it must be the same.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch

import polyroute
from polyroute.adapt import Adapted
from polyroute.build import from_checkpoint
from polyroute.data.open import open_suite
from polyroute.data.suite import held_out_tasks
from polyroute.demo.suite import TASKS, write_suite
from polyroute.host.files import write_json
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.loading import load_base
from polyroute.program.commands.runs import base_of
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.runs import machine
from polyroute.study.examples import encoded

SEEDS = (42, 1024, 0)
TASKS_EACH = 12
INTRODUCTION = """\
# Adapting many tasks in one run

{cpu}, {cores} cores, torch threads: {threads}; torch {torch}; {date}.

36 slots (12 tasks x 3 seeds) have the same settings. "Serial" calls `adapt_many` once for each
slot, "many" once for all. Neither time includes loading the model and encoding the examples. The
table shows the median of {rounds} rounds (range). The ratio is serial over many, so above 1 many
is faster. "Differs" is the largest difference between the factors of a slot in both, relative to
the largest number of the same tensor.

| base | phase | shots | batch | steps | serial, s | many, s | ratio (range) | differs |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Case:
    """36 slots of one kind."""

    base: str
    """`minilm` or `demo`."""
    phase: str
    batch_size: int
    steps: int
    shots: int = 32


CASES = (
    Case("minilm", "z", 16, 3),
    Case("minilm", "z", 4, 8),
    Case("minilm", "z", 1, 12),
    Case("minilm", "mu", 16, 3),
    Case("demo", "z", 16, 6),
    Case("demo", "z", 4, 12),
    Case("demo", "mu", 8, 10),
)


def minilm(options: argparse.Namespace) -> tuple[Any, ModelKind, dict[str, datasets.Dataset]]:
    """A run of `polyroute train` on the real suite, and some of the tasks that it adapts to."""
    base, kind = base_of(options.run)
    suite = open_suite(options.data)
    held_out = [t for t in held_out_tasks(suite) if suite.info(t).has_choices]
    tasks = held_out[:: len(held_out) // TASKS_EACH][:TASKS_EACH]
    model = from_checkpoint(base, read_checkpoint(options.run), str(options.run))
    return model, kind, {t: encoded(suite, t, "train", kind) for t in tasks}


def demo(_: argparse.Namespace) -> tuple[Any, ModelKind, dict[str, datasets.Dataset]]:
    """The demo's base model with a fresh inventory: time does not depend on what it has learned."""
    base, tokenizer = load_base("demo")
    kind = kind_of(base, tokenizer, max_input=96, max_target=20)
    config = polyroute.MHRConfig(num_skills=8, num_heads=8, rank=1)
    torch.manual_seed(0)
    model = polyroute.attach(base, config, [t.name for t in TASKS if t.role == "train"])
    with torch.no_grad():  # B is zero at the start, and then nothing moves in phase z
        for parameter in model.inventory.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tasks = [t.name for t in TASKS if t.role == "held-out"][:TASKS_EACH]
    with TemporaryDirectory() as folder:
        write_suite(Path(folder), train=200, validation=2, test=2)
        suite = open_suite(folder)
        return model, kind, {t: encoded(suite, t, "train", kind) for t in tasks}


def adapt(
    case: Case, model: Any, kind: ModelKind, rows: Mapping[str, datasets.Dataset], *, many: bool
) -> list[Adapted]:
    settings: dict[str, Any] = {
        "kind": kind, "phase": case.phase, "shots": case.shots, "steps": case.steps,
        "batch_size": case.batch_size,
    }  # fmt: skip
    if many:
        return polyroute.adapt_many(model, rows, seeds=SEEDS, **settings)
    return [
        result
        for task, examples in rows.items()
        for seed in SEEDS
        for result in polyroute.adapt_many(model, {task: examples}, seeds=[seed], **settings)
    ]


def difference(some: Sequence[Adapted], others: Sequence[Adapted]) -> float:
    """The largest difference between factors, relative to the largest number of their kind."""
    worst = 0.0
    for one, other in zip(some, others, strict=True):
        assert (one.task, one.seed) == (other.task, other.seed)
        for mine, theirs in zip(one.factors, other.factors, strict=True):
            for a, b in zip(vars(mine).values(), vars(theirs).values(), strict=True):
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    return worst


def measure(case: Case, loaded: Any, rounds: int) -> dict[str, Any]:
    model, kind, datasets_ = loaded
    # Rows as lists: reading Arrow is not what is compared.
    rows = {task: data.select(range(min(200, len(data)))) for task, data in datasets_.items()}
    seconds: dict[str, list[float]] = {"serial": [], "many": []}
    cpu: dict[str, list[float]] = {"serial": [], "many": []}
    ended: dict[str, list[Adapted]] = {}
    for number in range(rounds):
        for name in ("serial", "many") if number % 2 == 0 else ("many", "serial"):
            gc.collect()
            wall, process = time.perf_counter(), time.process_time()
            ended[name] = adapt(case, model, kind, rows, many=name == "many")
            seconds[name].append(time.perf_counter() - wall)
            cpu[name].append(time.process_time() - process)
    return {
        **asdict(case),
        "slots": len(ended["many"]),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "difference": difference(ended["many"], ended["serial"]),
        "load_average": os.getloadavg()[0],
    }


def table(report: dict[str, Any]) -> str:
    about = report["machine"]
    text = INTRODUCTION.format(
        **about, torch=about["versions"]["torch"], rounds=report["rounds"], date=report["date"]
    )
    for case in report["cases"]:
        serial, many = case["seconds"]["serial"], case["seconds"]["many"]
        ratios = [a / b for a, b in zip(serial, many, strict=True)]
        text += (
            f"| {case['base']} | {case['phase']} | {case['shots']} | {case['batch_size']} "
            f"| {case['steps']} | {statistics.median(serial):.1f} | {statistics.median(many):.1f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
            f"| {case['difference']:.1e} |\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="../shared/suite")
    parser.add_argument("--run", type=Path, default=Path("runs/real/mhr"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaders = {"minilm": minilm, "demo": demo}
    loaded: dict[str, Any] = {}
    report: dict[str, Any] = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "cases": [],
    }
    for number in options.cases:
        case = CASES[number]
        if case.base not in loaded:
            loaded[case.base] = loaders[case.base](options)
        report["cases"].append(measure(case, loaded[case.base], options.rounds))
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "adapt_many.json", report)
        (options.out / "adapt_many.md").write_text(table(report), encoding="utf-8")
        print(table(report).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
