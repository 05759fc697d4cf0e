"""What the commands do: from options to a finished run folder."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from polyroute.adapt import AdaptSettings, adapt_task, begin_task
from polyroute.analysis import describe_checkpoint
from polyroute.build import attach, from_checkpoint, from_pretrained
from polyroute.checkpoint import Checkpoint, read_checkpoint
from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.evaluate import TaskScore, check_answerable, evaluate, macro_average
from polyroute.examples import encoded_mixture
from polyroute.files import make_folder, read_json, write_json, write_tensors
from polyroute.kinds import ModelKind, kind_of
from polyroute.loading import load_base
from polyroute.metrics import mean_and_error
from polyroute.model import RoutedModel
from polyroute.runs import open_run, read_run, record
from polyroute.sampling import draw_few_shot
from polyroute.suite import Suite, check_tasks, held_out_tasks, training_tasks, validate
from polyroute.suites import open_suite
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

__all__ = ["adapt_run", "evaluate_run", "export_run", "inspect_run", "train_run"]

console = Console()


def train_run(options: Mapping[str, Any]) -> None:
    """Train an inventory; the run folder can then be given to `polyroute.from_pretrained`.

    Args:
        options: of `polyroute train`, by name.

    Raises:
        InputError: an option, the data or the base model cannot be used; nothing was trained.
    """
    adapter = MHRConfig(
        method=options["method"],
        adapter=options["adapter"],
        num_skills=options["skills"],
        num_heads=options["heads"],
        rank=options["rank"],
        alpha=options["alpha"],
        target_modules=options["target"],
        exclude_modules=options["exclude"],
        granularity=options["granularity"],
        init=options["init"],
        gate=options["gate"],
        normalization=options["normalization"],
        dropout=options["dropout"],
    )
    suite = open_suite(options["data"])
    base, tokenizer = load_base(options["model"], dtype=options["dtype"])
    kind = kind_of(
        base, tokenizer, max_input=options["max_input"], max_target=options["max_target"]
    )
    tasks = _chosen(suite, options["tasks"], training_tasks(suite), kind)
    validate(suite, tasks, needs=["train"])
    torch.manual_seed(options["seed"])
    model = attach(base, adapter, tasks)
    model.set_phase(options["phase"])
    folder = open_run(options["out"], resume=options["resume"], overwrite=options["overwrite"])
    record(folder, "train", {**_plain(options), "tasks": list(tasks)})
    console.print(model.describe(), highlight=False)
    trainer = MultiTaskTrainer(
        model, kind, _training_arguments(options, folder), encoded_mixture(
            suite, tasks, "train", kind
        )
    )  # fmt: skip
    last = _last_checkpoint(folder) if options["resume"] else None
    result = trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(folder)
    write_json(
        folder / "metrics.json",
        {
            **result.metrics,
            "steps": trainer.state.global_step,
            "parameters": model.counts(),
            "trained_parameters": model.num_trainable(),
            "log": trainer.state.log_history,
        },
    )
    console.print(f"trained {len(tasks)} tasks; the inventory is in {folder}", highlight=False)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole: the trainer's state comes last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _training_arguments(options: Mapping[str, Any], folder: Path) -> MultiTaskTrainingArguments:
    steps = options["steps"]
    return MultiTaskTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["accumulation"],
        learning_rate=options["lr"],
        route_lr=options["route_lr"],
        weight_decay=options["weight_decay"],
        warmup_steps=round(options["warmup"] * steps),
        temperature=options["temperature"],
        cap=options["cap"],
        phase=options["phase"],
        seed=options["seed"],
        bf16=options["bf16"],
        save_steps=options["save_steps"],
        save_total_limit=2,
        logging_steps=max(1, min(50, steps // 20)),
        report_to=options["report_to"],
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # None is transformers' own default; False would count as given.
        activation_checkpointing=True if options["checkpointing"] else None,
    )


def adapt_run(options: Mapping[str, Any]) -> None:
    """Adapt a run's inventory to every task, once per seed, and score each result.

    Results are written after each, so `resume` goes on with the next.

    Args:
        options: of `polyroute adapt`, by name.

    Raises:
        InputError: an option or the data cannot be used; nothing was trained.
    """
    settings = AdaptSettings(
        **{
            name: options[name]
            for name in ("phase", "shots", "steps", "batch_size", "lr", "route_lr",
                         "weight_decay", "init")
        }
    )  # fmt: skip
    checkpoint = read_checkpoint(options["run"])
    suite = open_suite(options["data"])
    base, kind = _base_of(options["run"])
    tasks = _chosen(suite, options["tasks"], held_out_tasks(suite), kind)
    split = options["split"]
    validate(suite, tasks, needs=["train", split])
    for task in tasks:
        draw_few_shot(len(suite.split(task, "train")), settings.shots, 0)
    _try_out(base, checkpoint, options["run"], tasks, settings)
    folder = open_run(options["out"], resume=options["resume"], overwrite=options["overwrite"])
    record(folder, "adapt", {**_plain(options), "tasks": list(tasks)})
    path = folder / "results.json"
    results: list[dict[str, Any]] = read_json(path) if path.exists() else []
    done = {(r["task"], r["seed"]) for r in results}
    slots = [(t, s) for t in tasks for s in options["seeds"] if (t, s) not in done]
    for task, seed in tqdm(slots, "adapting"):
        model = from_checkpoint(base, checkpoint, str(options["run"]))
        result = adapt_task(model, kind, suite, task, settings, seed=seed, split=split)
        _save_adapted(model, folder / task / f"seed-{seed}", task)
        base = model.unload()
        results.append(result)
        write_json(path, results)
    _print_adapted(results, tasks)
    console.print(f"results and adapters are in {folder}", highlight=False)


def _try_out(
    base: Any, checkpoint: Checkpoint, run: Any, tasks: Sequence[str], settings: AdaptSettings
) -> None:
    """Find out, before any work is lost, whether every task can begin."""
    for task in tasks:
        model = from_checkpoint(base, checkpoint, str(run))
        try:
            begin_task(model, task, settings, 0)
        finally:
            model.unload()


def _save_adapted(model: RoutedModel, folder: Path, task: str) -> None:
    model.export_peft(task, folder)
    if model.routes.logits is not None:
        write_tensors(folder / "route.safetensors", {"route": model.routes[task]})


def _print_adapted(results: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> None:
    table = Table("task", "metric", "score", "standard error", "seeds", "parameters", "seconds")
    means = []
    for task in tasks:
        rows = [r for r in results if r["task"] == task]
        mean, error = mean_and_error([r["score"] for r in rows])
        means.append(mean)
        table.add_row(
            task,
            rows[0]["metric"],
            f"{mean:.3f}",
            "" if error is None else f"{error:.3f}",
            str(len(rows)),
            f"{rows[0]['trained_parameters']:,}",
            f"{mean_and_error([r['seconds'] for r in rows])[0]:.1f}",
        )
    mean, error = mean_and_error(means)
    table.add_row("mean over tasks", "", f"{mean:.3f}", "" if error is None else f"{error:.3f}")
    console.print(table)


def evaluate_run(
    run: Path,
    data: str,
    names: Sequence[str] | None,
    zero_shot: bool,
    split: str,
    batch_size: int,
    out: Path | None,
) -> None:
    """Score a run and write the scores beside it.

    Raises:
        InputError: the run, the data or a name cannot be used.
    """
    checkpoint = read_checkpoint(run)
    suite = open_suite(data)
    base, kind = _base_of(run)
    trained = tuple(t for t in checkpoint.description["tasks"] if t in suite.tasks)
    tasks = _chosen(suite, names, held_out_tasks(suite) if zero_shot else trained, kind)
    validate(suite, tasks, needs=["train", split])
    model = from_checkpoint(base, checkpoint, str(run))
    route = "mu" if zero_shot else None
    for task in tasks:
        if route is None and task not in model.routes:
            raise InputError(
                f"task {task!r} has no route in {run}: add --zero-shot to route it as the average "
                "of the skills, or adapt to it with `polyroute adapt`"
            )
    model.eval()
    scores = evaluate(model, kind, suite, tasks, route=route, split=split, batch_size=batch_size)
    name = f"evaluate-{'zero-shot-' if zero_shot else ''}{split}.json"
    path = out or run / name
    make_folder(path.parent)
    write_json(
        path,
        {
            "run": str(run),
            "data": data,
            "split": split,
            "zero_shot": zero_shot,
            "macro_average": macro_average(scores),
            "tasks": [score.to_dict() for score in scores],
        },
    )
    _print_scores(scores)
    console.print(f"scores are in {path}", highlight=False)


def _print_scores(scores: Sequence[TaskScore]) -> None:
    table = Table("task", "metric", "score", "per token", "majority", "chance", "examples")
    for s in scores:
        table.add_row(
            s.task, s.metric, f"{s.score:.3f}", _number(s.score_normalised),
            f"{s.majority:.3f}", _number(s.chance), str(s.num_examples),
        )  # fmt: skip
    average = macro_average(scores)
    table.add_row(
        "mean over tasks", "", _number(average["score"]), "", _number(average["majority"]),
        _number(average["chance"]), "",
    )  # fmt: skip
    console.print(table)


def export_run(run: Path, task: str, out: Path) -> None:
    """Write one task of a run as a PEFT adapter.

    Raises:
        InputError: the run or the task cannot be used, or the folder cannot be written.
    """
    base, _ = _base_of(run)
    model = from_pretrained(base, run)
    model.export_peft(task, out)
    console.print(f"wrote {task!r} as a PEFT adapter to {out}", highlight=False)


def inspect_run(run: Path) -> None:
    """Print what a run holds.

    Raises:
        InputError: the folder holds no inventory.
    """
    console.print(describe_checkpoint(read_checkpoint(run)), highlight=False)


def _base_of(run: str | os.PathLike[str]) -> tuple[Any, ModelKind]:
    """The base model that a run was trained on, and its kind."""
    config = read_run(run)["config"]
    try:
        name, lengths = config["model"], (config["max_input"], config["max_target"])
    except KeyError as error:
        raise InputError(f"{run} was not written by `polyroute train`") from error
    base, tokenizer = load_base(name, dtype=config.get("dtype", "float32"))
    return base, kind_of(base, tokenizer, max_input=lengths[0], max_target=lengths[1])


def _chosen(
    suite: Suite, names: Sequence[str] | None, default: Sequence[str], kind: ModelKind
) -> tuple[str, ...]:
    """The tasks asked for; by default all that the base model can answer."""
    if names is not None:
        tasks = check_tasks(suite, names)
        check_answerable(suite, tasks, kind)
        return tasks
    able = [t for t in default if kind.supports_generation or suite.info(t).has_choices]
    if len(able) < len(default):
        console.print(
            f"left out {len(default) - len(able)} tasks without choices, which an encoder base "
            "model cannot answer",
            highlight=False,
        )
    return check_tasks(suite, able)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values."""
    return {
        k: str(v) if isinstance(v, Path) or (isinstance(v, float) and math.isinf(v)) else v
        for k, v in options.items()
    }
