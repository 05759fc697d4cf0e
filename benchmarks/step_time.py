"""Time and memory of one training step and of generation, relative to PEFT LoRA of the same rank.

    python benchmarks/step_time.py [--device cuda] [--groups main growth ...] [--cases NAME ...]
        [--rounds 9] [--threads 2] [--resume] [--quick] [--out FOLDER]

All contenders of a case run in this process, in the order A B C D, D C B A, ... The report has
medians and quartiles of the ratios within a round. Before anything is timed, polyroute's logits are
compared with those of a PEFT Poly that holds the same weights, so both compute the same function.
Results go to FOLDER/step_time.json, or step_time_cuda.json, after every case; `--resume` continues
an interrupted run. `benchmarks/page.py` shows them.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from cases import DEFAULT_GROUPS, GROUPS, Case, all_cases, quick_cases
from contenders import (
    REFERENCE,
    Contender,
    build_contenders,
    build_models,
    check_same_function,
    start,
)
from measure import count, interleave, peak_megabytes, saved_megabytes, summarise

import polyroute

RESULTS = Path(__file__).parent / "results"


def measure_figures(case: Case, contender: Contender) -> dict[str, Any]:
    """What does not depend on the machine's load."""
    figures: dict[str, Any] = {}
    if contender.kind == "eager":  # the others hide what they do
        figures |= count(contender.call, case.device)
        if not case.new_tokens:
            figures["saved_mb"] = saved_megabytes(contender.model, contender.inputs)
    if contender.kind != "graph":  # which took its memory when it was recorded
        figures["peak_mb"] = peak_megabytes(contender.call, case.device)
    return figures


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    started, commit = time.perf_counter(), current_commit()
    models = build_models(case)
    difference = check_same_function(case, models)
    contenders = build_contenders(case, models)
    failed = start(contenders)
    figures = {name: measure_figures(case, c) for name, c in contenders.items()}
    load = os.getloadavg()[0]
    calls = {name: contender.call for name, contender in contenders.items()}
    seconds = interleave(calls, rounds, case.device, case.calls)
    return {
        **asdict(case),
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "seconds": round(time.perf_counter() - started, 1),
        "relative_logit_difference": difference,
        "load_average": [load, os.getloadavg()[0]],
        "failed": failed,
        "contenders": {
            name: {
                **figures[name],
                "wall_ratio": summarise(times["wall_s"], seconds[REFERENCE]["wall_s"]),
                "cpu_ratio": summarise(times["cpu_s"], seconds[REFERENCE]["cpu_s"]),
                **times,
            }
            for name, times in seconds.items()
        },
    }


# ---------------------------------------------------------------- what it ran on


def current_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Machine and versions: what must be the same for all results of one file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "polyroute": polyroute.__version__,
    }


# ---------------------------------------------------------------- the command


def read_report(path: Path, machine: Mapping[str, Any], *, resume: bool) -> dict[str, Any]:
    """The results so far: those in the file to resume from, else none.

    Raises:
        SystemExit: they come from another machine or from other versions.
    """
    if not resume or not path.exists():
        return {"machine": dict(machine), "cases": []}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if report["machine"] != machine:
        names = [n for n in machine if report["machine"].get(n) != machine[n]]
        raise SystemExit(f"{path} cannot be resumed, other than here are: {', '.join(names)}")
    return report


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="default: by device")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these")
    parser.add_argument("--list", action="store_true", help="name the chosen cases and stop")
    parser.add_argument("--rounds", type=int, help="timed rounds per case (default 9; --quick 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="skip cases that have a result")
    parser.add_argument("--quick", action="store_true", help="a few tiny cases, as a smoke test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 2 if options.quick else 9
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if options.quick and options.device != "cpu":
        parser.error("--quick runs on the CPU")
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs an --out of its own: its figures are no results")
    known = {case.name for case in all_cases(options.device)}
    if unknown := sorted(set(options.cases or []) - known):
        parser.error(f"no such case: {', '.join(unknown)} (--list names them)")
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    if options.quick:
        return quick_cases()
    cases = all_cases(options.device)
    if options.cases:
        return [case for case in cases if case.name in options.cases]
    groups = options.groups or DEFAULT_GROUPS[options.device]
    if options.device == "cpu" and "gpu" in groups:
        print("skipped: the group gpu needs --device cuda", file=sys.stderr)
    return [case for case in cases if case.group in groups]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases; 1 if one of them failed."""
    options = parse_arguments(arguments)
    chosen = choose_cases(options)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: the GPU cases need a CUDA device, and none is here", file=sys.stderr)
        return 0
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's, of transformers' new names
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("step_time_cuda.json" if options.device == "cuda" else "step_time.json")
    machine = describe_machine(options.device, options.threads)
    report = read_report(path, machine, resume=options.resume)
    done = {case["name"] for case in report["cases"]}
    failed = 0
    for number, case in enumerate(chosen, start=1):
        if case.name in done:
            continue
        where = f"[{number}/{len(chosen)}] {case.name}"
        try:
            result = run_case(case, options.rounds)
        except Exception:  # a case that does not fit must not cost the others
            failed += 1
            print(f"{where}: FAILED\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        else:
            report["cases"].append(result)
            write_atomically(path, json.dumps(report, indent=1) + "\n")
            ratios = {n: c["wall_ratio"]["median"] for n, c in result["contenders"].items()}
            print(f"{where}: {result['seconds']} s, {ratios}", file=sys.stderr, flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
