"""The demo: shared, poly and mhr side by side on the generated suite, in a few minutes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from polyroute.adapt import SuiteSlots, adapt_suite
from polyroute.adapting.settings import AdaptSettings
from polyroute.build import attach, loaded
from polyroute.config import MHRConfig
from polyroute.data.metrics import mean_and_error
from polyroute.data.open import open_suite
from polyroute.data.suite import Suite
from polyroute.demo.figures import draw_accuracy, draw_routes
from polyroute.demo.routes import RouteReport, relate_routes_to_skills
from polyroute.demo.suite import TASKS, write_suite
from polyroute.host.files import read_json, write_json
from polyroute.host.interrupts import resumable
from polyroute.host.output import Result, say
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.loading import load_base
from polyroute.model import RoutedModel
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.runs import held, machine, open_run, record
from polyroute.study.evaluate import evaluate, macro_average
from polyroute.study.examples import encoded_mixture
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

__all__ = ["run_demo"]

CONFIGS = {
    "shared": MHRConfig(method="shared", rank=1),
    "poly": MHRConfig(method="poly", num_skills=8, rank=1),
    "mhr": MHRConfig(method="mhr", num_skills=8, num_heads=8, rank=1),
}
# A shared LoRA is one adapter already, so `full` and `mu` are the same there.
PHASES = {"shared": ("full",), "poly": ("z", "mu", "full"), "mhr": ("z", "mu", "full")}
# The same for all methods. The rates were chosen on compositions that are neither trained on nor
# held out.
TRAIN = {"steps": 250, "batch_size": 32, "lr": 5e-3, "route_lr": 0.1}
ADAPT = {"shots": 8, "batch_size": 8, "steps": 20, "lr": 5e-3, "route_lr": 1.0}
SEEDS = (42, 1024, 0)
TEST_EXAMPLES = 60
DONE = "done.json"
"""The file with the results of finished methods."""


def run_demo(
    out: Path, *, quick: bool = False, resume: bool = False, overwrite: bool = False
) -> Result:
    """Train, adapt, compare, and write the results.

    Args:
        out: the folder for the suite, results (`results.json`, `results.md`), plots and adapters.
        quick: use a tenth of the steps, one seed and two held-out tasks.
        resume: continue the demo in the folder after its finished methods.
        overwrite: delete the demo in the folder.

    Returns:
        The content of `results.json`.

    Raises:
        InputError: the folder is not empty, or cannot be written.
    """
    started = time.perf_counter()
    folder = open_run(out, "demo", resume=resume, overwrite=overwrite)
    config = {"quick": quick, "train": TRAIN, "adapt": ADAPT, "model": "demo"}
    record(folder, "demo", config, resume=resume)
    with held(folder), resumable(folder):
        return _run(folder, quick=quick, started=started)


@dataclass(frozen=True)
class _Demo:
    """What all methods of one demo share."""

    folder: Path
    suite: Suite
    kind: ModelKind
    training: Sequence[str]
    held_out: Sequence[str]
    quick: bool

    def train(self, model: RoutedModel) -> float:
        """Train on all training tasks; returns the seconds that it took."""
        steps = TRAIN["steps"] // (10 if self.quick else 1)
        arguments = MultiTaskTrainingArguments(
            output_dir=str(self.folder / model.adapter_config.method),
            max_steps=int(steps),
            per_device_train_batch_size=int(TRAIN["batch_size"]),
            learning_rate=TRAIN["lr"],
            route_lr=TRAIN["route_lr"],
            warmup_steps=int(steps // 20),
            seed=0,
            save_strategy="no",
            logging_steps=int(max(1, steps // 10)),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            log_level="warning",
        )
        mixture = encoded_mixture(self.suite, self.training, "train", self.kind)
        trainer = MultiTaskTrainer(model, self.kind, arguments, mixture)
        trainer.remove_callback(_printer())
        started = time.perf_counter()
        say(f"training {model.adapter_config.method} on {len(self.training)} tasks")
        trainer.train()
        return time.perf_counter() - started

    def adapt(self, base: Any, method: str) -> list[dict[str, Any]]:
        """Adapt to every held-out task in every phase and seed; export one of the results."""
        results: list[dict[str, Any]] = []
        place = self.folder / method
        with loaded(base, read_checkpoint(place), place) as model:
            for phase in PHASES[method]:

                def each(result: dict[str, Any], route: str) -> None:
                    results.append({"method": method, **result})
                    first = self.held_out[0]
                    is_first = (result["task"], result["seed"]) == (first, SEEDS[0])
                    if (method, result["phase"]) == ("mhr", "z") and is_first:
                        lora = self.folder / "lora" / first
                        model.export_peft(route, lora)
                        write_peft_card(lora, self.kind.prompting, {"model": "demo"})

                settings = {"": AdaptSettings(phase=phase, **ADAPT)}  # type: ignore[arg-type]
                seeds = SEEDS[:1] if self.quick else SEEDS
                wanted = SuiteSlots(
                    suite=self.suite, tasks=self.held_out, choices=settings, seeds=seeds
                )
                adapt_suite(model, self.kind, wanted, each=each)
        return results


def _run(folder: Path, *, quick: bool, started: float) -> Result:
    write_suite(folder / "suite", train=200, validation=20, test=TEST_EXAMPLES)
    base, tokenizer = load_base("demo")
    held_out = [task.name for task in TASKS if task.role == "held-out"]
    demo = _Demo(
        folder,
        open_suite(folder / "suite"),
        kind_of(base, tokenizer, max_input=96, max_target=20),
        [task.name for task in TASKS if task.role == "train"],
        # Two of three, which keeps the skills in balance and the demo under five minutes.
        held_out[:2] if quick else [t for i, t in enumerate(held_out) if i % 3 != 2],
        quick,
    )
    done: dict[str, Any] = {"results": [], "multi_task": {}, "seconds": 0.0}
    if (folder / DONE).is_file():
        done = read_json(folder / DONE)
    started -= done["seconds"]
    for method, config in CONFIGS.items():
        if method in done["multi_task"]:
            continue
        torch.manual_seed(0)
        model = attach(base, config, demo.training)
        seconds = demo.train(model)
        model.save_pretrained(folder / method)
        scores = evaluate(
            model, demo.kind, demo.suite, demo.training, split="validation", batch_size=100
        )
        done["multi_task"][method] = {
            **macro_average(scores),
            "seconds": seconds,
            "trained_parameters": model.num_trainable(),
        }
        base = model.unload()  # type: ignore[assignment]
        done["results"] += demo.adapt(base, method)
        done["seconds"] = time.perf_counter() - started
        write_json(folder / DONE, done)
    return _reported(folder, done["results"], done["multi_task"], started)


def _reported(
    folder: Path,
    results: list[dict[str, Any]],
    multi_task: dict[str, Any],
    started: float,
) -> Result:
    """Write the results and plots of all methods."""
    routes = relate_routes_to_skills(read_checkpoint(folder / "mhr"))
    report: dict[str, Any] = {
        "multi_task": multi_task,
        "adaptations": results,
        "routes": routes.to_dict(),
        "seconds": time.perf_counter() - started,
        "machine": machine(),
    }
    write_json(folder / "results.json", report)
    summary = _summarise(results)
    draw_accuracy(folder / "accuracy.png", summary)
    draw_routes(folder / "routes.png", routes)
    words = _in_words(results, summary, multi_task, routes)
    return Result(
        {"out": folder, "summary": summary, **report},
        _shown(summary, multi_task, words, folder, report["seconds"]),
    )


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per method and phase, with the mean over tasks and seeds and its error."""
    entries = []
    for method, phases in PHASES.items():
        for phase in phases:
            rows = [r for r in results if r["method"] == method and r["phase"] == phase]
            mean, error = mean_and_error([r["score"] for r in rows])
            entries.append(
                {
                    "method": method,
                    "phase": phase,
                    "accuracy": mean,
                    "standard_error": error,
                    "trained_parameters": rows[0]["trained_parameters"],
                    "seconds": float(np.mean([r["seconds"] for r in rows])),
                    "runs": len(rows),
                }
            )
    return entries


def _difference(
    results: Sequence[dict[str, Any]], one: tuple[str, str], other: tuple[str, str]
) -> tuple[float, float]:
    """The mean difference of two ways, paired by task and seed, and its standard error."""
    score = {(r["method"], r["phase"], r["task"], r["seed"]): r["score"] for r in results}
    slots = [key[2:] for key in score if key[:2] == one]
    mean, error = mean_and_error([score[(*one, *s)] - score[(*other, *s)] for s in slots])
    return mean, error or 0.0


def _in_words(
    results: Sequence[dict[str, Any]],
    summary: Sequence[dict[str, Any]],
    multi_task: dict[str, Any],
    routes: RouteReport,
) -> list[str]:
    """The findings as sentences, computed from the results."""
    best = max(summary, key=lambda entry: entry["accuracy"])
    lines = [
        "On the training tasks (validation split) the accuracies are "
        + ", ".join(f"{m} {v['score']:.3f}" for m, v in multi_task.items())
        + ", at the same number of steps and batches.",
        f"On held-out compositions the best is {best['method']} in phase {best['phase']}: "
        f"{best['accuracy']:.3f}.",
    ]
    pairs = [
        (("mhr", "z"), ("poly", "z")),
        (("mhr", "mu"), ("poly", "mu")),
        (("mhr", "full"), ("poly", "full")),
        (("mhr", "full"), ("shared", "full")),
        (("poly", "full"), ("shared", "full")),
        (("mhr", "z"), ("mhr", "full")),
        (("mhr", "mu"), ("mhr", "full")),
    ]
    for one, other in pairs:
        mean, error = _difference(results, one, other)
        if abs(mean) <= 2 * error:
            verdict = "cannot be told apart from"
        else:
            verdict = "is better than" if mean > 0 else "is worse than"
        lines.append(
            f"{one[0]}/{one[1]} {verdict} {other[0]}/{other[1]}: {mean:+.3f} "
            f"(standard error {error:.3f}, paired)."
        )
    return [*lines, *routes.in_words()]


def _shown(
    summary: Sequence[dict[str, Any]],
    multi_task: dict[str, Any],
    words: Sequence[str],
    folder: Path,
    seconds: float,
) -> tuple[Any, ...]:
    """Write `results.md`; returns the same content for the terminal."""
    table = Table("method", "phase", "accuracy", "standard error", "trained parameters", "seconds")
    lines = [
        "| method | phase | accuracy | standard error | trained parameters | seconds a task |",
        "|---|---|---|---|---|---|",
    ]
    for e in summary:
        error = "" if e["standard_error"] is None else f"{e['standard_error']:.3f}"
        cells = [
            e["method"], e["phase"], f"{e['accuracy']:.3f}", error,
            f"{e['trained_parameters']:,}", f"{e['seconds']:.1f}",
        ]  # fmt: skip
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    trained = ", ".join(
        f"{method} {entry['trained_parameters']:,} parameters in {entry['seconds']:.0f} s"
        for method, entry in multi_task.items()
    )
    text = [
        "# polyroute demo",
        "",
        f"Multi-task training: {trained}. Few-shot adaptation to held-out tasks:",
        "",
        *lines,
        "",
        *(f"- {line}" for line in words),
        "",
    ]
    (folder / "results.md").write_text("\n".join(text), encoding="utf-8")
    return (
        f"multi-task training: {trained}",
        table,
        *(f"- {line}" for line in words),
        f"{seconds:.0f} s; tables, plots (accuracy.png, routes.png) and a LoRA are in {folder}",
    )
