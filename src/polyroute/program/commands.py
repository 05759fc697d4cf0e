"""What the commands do: from options to a finished run folder."""

import itertools
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.markup import escape
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback

from polyroute.adapt import AdaptSettings, adapt_suite, check_learned, check_new, variants
from polyroute.adapting.memory import plan
from polyroute.adapting.slots import check_starts
from polyroute.build import attach, from_checkpoint, loaded
from polyroute.config import MHRConfig
from polyroute.data.metrics import mean_and_error
from polyroute.data.sampling import draw_few_shot
from polyroute.data.suite import Suite, check_tasks, held_out_tasks, training_tasks, validate
from polyroute.errors import InputError
from polyroute.exchange import check_export, read_inventory, write_inventory
from polyroute.exchange.foreign import read_names
from polyroute.host.files import (
    check_place,
    finite,
    make_folder,
    read_json,
    write_json,
    write_tensors,
)
from polyroute.host.interrupts import deferred, resumable
from polyroute.host.output import Result, say
from polyroute.host.processes import count, index, is_first, wait
from polyroute.host.progress import progress
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.kinds.objectives import Objective
from polyroute.loading import load_base, load_suite
from polyroute.model import RoutedModel
from polyroute.optimizers import summary
from polyroute.program.plans import plan_of_adapting, plan_of_training
from polyroute.saved.card import write_card
from polyroute.saved.checkpoint import Checkpoint, read_checkpoint
from polyroute.saved.hub import DESCRIPTION, Repository, locate, push
from polyroute.saved.runs import (
    DIGEST,
    RUNNING,
    check_run,
    digest,
    held,
    open_run,
    read_run,
    record,
)
from polyroute.study.alignment import AlignmentCallback
from polyroute.study.analysis import analyse, describe_checkpoint
from polyroute.study.evaluate import TaskScore, evaluate, macro_average
from polyroute.study.examples import encoded_mixture
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

__all__ = [
    "adapt_run",
    "base_of",
    "evaluate_run",
    "export_run",
    "import_run",
    "inspect_run",
    "push_run",
    "train_run",
]

METRICS = "metrics.json"
ALIGNMENT = "alignment.json"
TRAINER_STATE = "trainer_state.json"
OPTION_OF = {
    "num_skills": "skills", "num_heads": "heads", "target_modules": "target",
    "exclude_modules": "exclude",
}  # fmt: skip
"""What options of training are called that have another name in `MHRConfig`."""
OPTIMS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}
SCHEDULERS = {"linear": "linear", "constant": "constant_with_warmup"}
"""What the trainer calls the values of --optimizer and --schedule."""
OF_ONE_PIECE = {
    "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"
}  # fmt: skip
"""What the trainer measures from where it went on, as if that were all of the run."""
TORCH_FILES = ("optimizer.pt", "scheduler.pt")
RANDOM, RANDOM_OF_SEVERAL = "rng_state.pth", "rng_state_*.pth"
RESULT = {"task", "seed", "label", "metric", "score", "trained_parameters", "seconds"}


def train_run(options: Mapping[str, Any]) -> Result:
    """Train an inventory; the run folder can then be given to `polyroute.from_pretrained`.

    Args:
        options: of `polyroute train`, by name.

    Returns:
        The metrics or, of a dry run, the plan.

    Raises:
        InputError: an option, the data or the base model cannot be used; nothing was trained.
    """
    resume = options["resume"]
    place = {
        "resume": resume,
        "overwrite": options["overwrite"],
        "inputs": tuple(filter(None, (options["model"], options["start"], options["data"]))),
    }
    adapter = _adapter(options)
    start = options["start"] and Path(locate(options["start"]))
    checkpoint = None if start is None else _inventory(start)
    if checkpoint is not None:
        options = {**options, **_base_options(start), **_adapter_options(checkpoint)}
    folder = check_run(options["out"], "train", **place)
    suite = load_suite(options["data"], options["reader"])
    base, tokenizer = load_base(options["model"], dtype=options["dtype"])
    kind = kind_of(
        base, tokenizer, max_input=options["max_input"], max_target=options["max_target"],
        objective=options["objective"],
    )  # fmt: skip
    tasks = _chosen(
        suite, options["tasks"], training_tasks(suite), kind,
        none=f"every task of {options['data']} is held out",
    )  # fmt: skip
    validate(suite, tasks, needs=["train"])
    torch.manual_seed(options["seed"])
    if checkpoint is None:
        model = _attached(base, adapter, tasks)
    else:
        model = from_checkpoint(base, checkpoint, str(start))
        model.check_phase(options["phase"])
        model.add_tasks([task for task in tasks if task not in model.routes])
    model.set_phase(options["phase"])
    rows = encoded_mixture(suite, tasks, "train", kind)
    trainer = _trainer(model, kind, options, rows)
    if options["alignment_steps"] is not None:
        if trainer.is_fsdp_enabled:
            raise InputError("--alignment needs a whole base model: leave it out under FSDP")
        steps = options["alignment_steps"]
        trainer.add_callback(AlignmentCallback(model, kind, rows, folder / ALIGNMENT, steps=steps))
    optimization = summary(options)
    config = {**_plain(options), "tasks": list(tasks), "optimization": optimization}
    if options["dry_run"]:
        if resume:
            record(folder, "train", config, resume=True)  # which compares, and writes nothing
        return plan_of_training(trainer, options, tasks, folder)
    open_run(folder, "train", **place)
    record(folder, "train", config, resume=resume)
    with held(folder), resumable(folder):
        if resume and (folder / METRICS).is_file():
            say(f"the run in {folder} is finished; there is nothing to resume")
        else:
            say(model.describe())
            say(optimization)
            _train_to_the_end(trainer, folder, _last_checkpoint(folder) if resume else None)
        metrics = read_json(folder / METRICS)
    return Result(
        {"out": folder, "tasks": tasks, **{k: v for k, v in metrics.items() if k != "log"}},
        (f"trained {len(tasks)} tasks; the inventory is in {folder}",),
    )


def _adapter(options: Mapping[str, Any]) -> MHRConfig:
    names = [field.name for field in fields(MHRConfig)]
    return MHRConfig(**{name: options[OPTION_OF.get(name, name)] for name in names})


def _adapter_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an inventory says of itself: options of `polyroute train`."""
    config = checkpoint.description["config"]
    return {OPTION_OF.get(name, name): config[name] for name in config}


def _train_to_the_end(trainer: MultiTaskTrainer, folder: Path, last: Path | None) -> None:
    """Train, from a checkpoint if there is one, and write the inventory and the metrics."""
    model = trainer.model
    found: Mapping[str, Any] = {}
    trainer.args.output_dir = str(folder)
    state: dict[str, Any] = {"global_step": -1} if last is None else read_json(last / TRAINER_STATE)
    if last is not None and state["global_step"] >= trainer.args.max_steps:
        model.load_adapter(last)  # it was interrupted between the last step and the end
        steps, log = state["global_step"], state["log_history"]
    else:
        # Where several processes train, only one of them may hear of it: nobody waits there.
        alone = trainer.args.world_size == 1
        with deferred() if alone else nullcontext(bool) as is_stopped:
            trainer.add_callback(_SaveWhenStopped(is_stopped))
            checkpoint = None if last is None else str(last)
            found = trainer.train(resume_from_checkpoint=checkpoint).metrics
        steps, log = trainer.state.global_step, trainer.state.log_history
    if last is not None:
        found, *log = (
            {key: value for key, value in entry.items() if key not in OF_ONE_PIECE}
            for entry in (found, *log)
        )
    learned = [*model.inventory.parameters(), *model.routes.parameters()]
    if not all(bool(torch.isfinite(p).all()) for p in learned):
        raise _diverged("a weight is not finite", steps)
    model.save_pretrained(folder, is_main_process=is_first())
    if is_first():
        write_json(
            folder / METRICS,
            {
                **_finite(found),
                "steps": steps,
                "parameters": model.counts(),
                "trained_parameters": model.num_trainable(),
                "log": [_finite(entry) for entry in log],
            },
        )
    wait()


def _diverged(what: str, step: int) -> InputError:
    return InputError(
        f"training diverged: {what} at step {step}; lower --lr and start again with --overwrite"
    )


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a log as JSON values; a gradient norm can be infinite where the loss is not."""
    return {key: finite(value) for key, value in entry.items()}


class _StopWhenDiverged(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss", (logs or {}).get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise _diverged(f"the loss is {loss}", state.global_step)


class _SaveWhenStopped(TrainerCallback):
    """Ends training with a checkpoint, after the step in which Ctrl-C was pressed."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.is_stopped():
            control.should_save = control.should_training_stop = True


class _ShowProgress(TrainerCallback):
    bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.bar = progress(what="training", unit="step", **steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {logs['loss']:.4g}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _attached(base: Any, adapter: MHRConfig, tasks: Sequence[str]) -> RoutedModel:
    try:
        return attach(base, adapter, tasks)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        about_size = ("memory", "alloc", "overflow", "too large", "storage size", "dimension")
        if isinstance(error, RuntimeError | TypeError) and not any(
            w in reason.lower() for w in about_size
        ):
            raise
        raise InputError(
            f"the inventory cannot be made: lower --skills or --rank ({reason})"
        ) from error


def _trainer(
    model: RoutedModel, kind: ModelKind, options: Mapping[str, Any], rows: datasets.Dataset
) -> MultiTaskTrainer:
    """The trainer, checked as far as that can be done before training; it makes no folder."""
    with tempfile.TemporaryDirectory() as elsewhere:  # a trainer makes its folder at once
        try:
            arguments = _training_arguments(options, Path(elsewhere))
            trainer = MultiTaskTrainer(model, kind, arguments, rows)
            trainer._get_train_sampler()
        except InputError:
            raise
        except (ValueError, TypeError, RuntimeError, ImportError, OverflowError) as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise InputError(f"the training options cannot be used: {reason}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_ShowProgress())
    trainer.add_callback(_StopWhenDiverged())
    return trainer


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None before the first.

    Raises:
        InputError: all there are are damaged.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    damages: list[str] = []
    for path in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        if not (path / TRAINER_STATE).is_file():
            continue  # it is written last: the run was interrupted while it wrote the checkpoint
        damage = _damage(path)
        if damage is None:
            for sentence in damages:
                say(f"{sentence}; resuming from {path.name}")
            return path
        damages.append(damage)
    if damages:
        raise InputError(f"{damages[0]}; delete that checkpoint to start from the beginning")
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of the trainer, if anything."""
    random = sorted(checkpoint.glob(RANDOM_OF_SEVERAL)) or [checkpoint / RANDOM]
    for path in (*(checkpoint / name for name in TORCH_FILES), *random):
        if not path.is_file():
            return f"{path} is missing"
        if not zipfile.is_zipfile(path):
            return f"{path} is damaged"
    path = checkpoint / TRAINER_STATE
    try:
        state = read_json(path)
        _ = read_checkpoint(checkpoint).tasks  # of every file of the routing table
    except InputError as error:
        return str(error)
    if not (
        isinstance(state, dict)
        and isinstance(state.get("global_step"), int)
        and isinstance(state.get("log_history"), list)
    ):
        return f"{path} is damaged"
    return None


def _training_arguments(options: Mapping[str, Any], folder: Path) -> MultiTaskTrainingArguments:
    steps = options["steps"]
    if options["batch_size"] % count():
        raise InputError(
            f"--batch-size {options['batch_size']} cannot be shared by {count()} processes: make "
            "it a multiple"
        )
    return MultiTaskTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options["batch_size"] // count(),
        gradient_accumulation_steps=options["accumulation"],
        learning_rate=options["lr"],
        route_lr=options["route_lr"],
        weight_decay=options["weight_decay"],
        route_weight_decay=options["route_weight_decay"],
        optim=OPTIMS[options["optimizer"]],
        scale_parameter=options["scale_parameter"],
        max_grad_norm=options["max_grad_norm"],
        lr_scheduler_type=SCHEDULERS[options["schedule"]],
        rowwise_routes=options["rowwise"],
        warmup_steps=round(options["warmup"] * steps),
        temperature=options["temperature"],
        cap=options["cap"],
        phase=options["phase"],
        seed=options["seed"],
        bf16=options["bf16"],
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_steps=options["save_steps"],
        save_total_limit=2,
        logging_steps=max(1, min(50, steps // 20)),
        report_to=options["report_to"],
        disable_tqdm=True,  # its bar prints what is logged to standard output
        dataloader_pin_memory=torch.cuda.is_available(),
        # None is transformers' own default; False would count as given.
        activation_checkpointing=True if options["checkpointing"] else None,
    )


def adapt_run(options: Mapping[str, Any]) -> Result:
    """Adapt a run's inventory to every task, once per seed and setting, and score each result.

    All run side by side. Results are written as they come and running slots about once a minute,
    so `resume` goes on where it stopped. Several processes adapt a share each.

    Args:
        options: of `polyroute adapt`, by name.

    Returns:
        All results or, of a dry run, the plan.

    Raises:
        InputError: an option or the data cannot be used; nothing was trained.
    """
    settings = AdaptSettings(**{field.name: options[field.name] for field in fields(AdaptSettings)})
    choices = variants(settings, options["grid"])
    run, resume, split = Path(locate(options["run"])), options["resume"], options["split"]
    place = {
        "resume": resume,
        "overwrite": options["overwrite"],
        "inputs": (run, options["data"]),
    }
    folder = check_run(options["out"], "adapt", **place)
    checkpoint = _inventory(run)
    suite = load_suite(options["data"], options["reader"])
    base, kind = base_of(run, objective=options["objective"])
    tasks = _chosen(
        suite, options["tasks"], held_out_tasks(suite), kind,
        none=f"{options['data']} holds no task out",
    )  # fmt: skip
    validate(suite, tasks, needs=["train", split])
    for task, variant in itertools.product(tasks, choices.values()):
        shots = (variant.shots or 0) + variant.validation_shots
        draw_few_shot(len(suite.split(task, "train")), shots, 0)
    with loaded(base, checkpoint, run) as model:
        _try_out(model, tasks, choices)
        budget = plan(model, kind, settings.phase, options["memory"])
        ways = list(dict.fromkeys(choice.optimization for choice in choices.values()))
        config = {**_plain(options), "tasks": list(tasks), DIGEST: digest(run)}
        config["optimization"] = ways
        if options["dry_run"]:
            if resume:
                record(folder, "adapt", config, resume=True)  # which compares, and writes nothing
            return plan_of_adapting(model, suite, budget, options, tasks, choices, folder)
        open_run(folder, "adapt", **place)
        record(folder, "adapt", config, resume=resume)
        with held(folder), resumable(folder):
            say("\n".join(ways))
            path, running = folder / "results.json", folder / RUNNING
            wait()  # for the first process, which makes the folder of the run
            make_folder(running)
            order = list(itertools.product(tasks, choices, options["seeds"]))
            done = _gather(path, running, order)
            own = path if is_first() else running / f"results-{index()}.json"
            results = list(done) if is_first() else []

            def each(result: dict[str, Any], route: str) -> None:
                seed = f"seed-{result['seed']}"
                _save_adapted(model, folder / result["task"] / seed / result["label"], route)
                results.append(result)
                write_json(own, results)

            adapted = adapt_suite(
                model, kind, suite, tasks, choices, seeds=options["seeds"], split=split,
                memory=options["memory"], folder=running, done=done,
                part=slice(index(), None, count()) if count() > 1 else slice(None), each=each,
            )  # fmt: skip
            results += [result for result in adapted if result["score"] is None]
            write_json(own, results)
            results = _gather(path, running, order)
            check_learned(results)
        if is_first():
            shutil.rmtree(running)  # a killed process may have left half a file there
    tables, means = _adapted(results, tasks, choices)
    diverged = [result for result in results if result["score"] is None]
    if diverged:
        names = ", ".join(f"{r['task']} with seed {r['seed']} {r['label']}" for r in diverged[:3])
        say(f"diverged and left out: {len(diverged)} of {len(results)} ({names}); lower --lr")
    return Result(
        {"out": folder, "means": means, "results": results},
        (*tables, f"results and adapters are in {folder}"),
    )


def _gather(
    path: Path, running: Path, order: Sequence[tuple[str, str, int]]
) -> list[dict[str, Any]]:
    """All results of all processes, in the order of the slots; they are then in one file."""
    wait()
    if is_first():
        parts = sorted(running.glob("results-*.json"))
        found = [r for file in (path, *parts) if file.exists() for r in _read_results(file)]
        if found or parts:
            place = {slot: i for i, slot in enumerate(order)}
            found.sort(key=lambda r: place.get((r["task"], r["label"], r["seed"]), len(place)))
            write_json(path, found)
        for file in parts:
            file.unlink()
    wait()
    return _read_results(path) if path.exists() else []


def _read_results(path: Path) -> list[dict[str, Any]]:
    results = read_json(path)
    if not isinstance(results, list) or not all(
        isinstance(r, dict) and r.keys() >= RESULT for r in results
    ):
        raise InputError(f"{path} is damaged: it is not a list of results; delete it to start over")
    return results


def _try_out(
    model: RoutedModel, tasks: Sequence[str], choices: Mapping[str, AdaptSettings]
) -> None:
    """Find out, before any work is lost, whether every task can begin."""
    for task in tasks:
        check_new(model, task)
    settings = list(choices.values())
    check_starts(model, settings[0].phase, [each.init for each in settings])


def _save_adapted(model: RoutedModel, folder: Path, route: str) -> None:
    model.export_peft(route, folder)
    if model.routes.logits is not None:
        write_tensors(folder / "route.safetensors", {"route": model.routes[route]})


def _adapted(
    results: Sequence[Mapping[str, Any]], tasks: Sequence[str], labels: Iterable[str]
) -> tuple[list[Table], list[dict[str, Any]]]:
    """A table for each setting, and the mean over tasks of each."""
    tables, means_of = [], []
    columns = ("task", "metric", "score", "standard error", "seeds", "parameters", "seconds")
    for label in labels:
        table = Table(*columns, title=escape(label) or None)
        means = []
        for task in tasks:
            rows = [r for r in results if r["task"] == task and r["label"] == label]
            rows = [r for r in rows if r["score"] is not None]
            if not rows:
                table.add_row(escape(task), "", "diverged")
                continue
            mean, error = mean_and_error([r["score"] for r in rows])
            means.append(mean)
            table.add_row(
                escape(task),
                rows[0]["metric"],
                _number(mean),
                _number(error),
                str(len(rows)),
                f"{rows[0]['trained_parameters']:,}",
                f"{mean_and_error([r['seconds'] for r in rows])[0]:.1f}",
            )
        if means:
            mean, error = mean_and_error(means)
            means_of.append({"label": label, "score": mean, "standard_error": error})
            table.add_row("mean over tasks", "", _number(mean), _number(error))
        tables.append(table)
    return tables, means_of


def evaluate_run(
    run: Path,
    data: str,
    names: Sequence[str] | None,
    zero_shot: bool,
    split: str,
    batch_size: int,
    out: Path | None,
    reader: Mapping[str, Any] | None = None,
) -> Result:
    """Score a run and write the scores beside it; `reader` has options of the suite's reader.

    Raises:
        InputError: the run, the data or a name cannot be used.
    """
    path = out or run / f"evaluate-{'zero-shot-' if zero_shot else ''}{split}.json"
    asked, run = run, Path(locate(run))
    checkpoint = _inventory(run)
    _check_scores_place(path)
    suite = load_suite(data, reader)
    base, kind = base_of(run)
    trained = tuple(t for t in checkpoint.tasks if t in suite.tasks)
    tasks = _chosen(
        suite, names, held_out_tasks(suite) if zero_shot else trained, kind,
        none=f"{data} holds no task out" if zero_shot else f"{data} has none of the tasks of {run}",
    )  # fmt: skip
    validate(suite, tasks, needs=["train", split])
    route = "mu" if zero_shot else None
    with loaded(base, checkpoint, run) as model:
        for task in tasks:
            if route is None and task not in model.routes:
                raise InputError(
                    f"task {task!r} has no route in {run}: add --zero-shot to route it as the "
                    "average of the skills, or adapt to it with `polyroute adapt`"
                )
        model.eval()
        scores = evaluate(
            model, kind, suite, tasks, route=route, split=split, batch_size=batch_size
        )
    make_folder(path.parent)
    content = {
        "run": str(asked),
        "data": data,
        "split": split,
        "zero_shot": zero_shot,
        "macro_average": macro_average(scores),
        "tasks": [score.to_dict() for score in scores],
    }
    write_json(path, content)
    return Result({"out": path, **content}, (_table_of(scores), f"scores are in {path}"))


def _check_scores_place(path: Path) -> None:
    """Make sure, before anything is scored, that scores can be written and replace only scores."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a JSON file as --out")
    check_place(path.parent)
    if not path.exists():
        return
    try:
        former = read_json(path)
    except InputError:
        former = None
    if not isinstance(former, dict) or not former.keys() >= {"macro_average", "split", "tasks"}:
        raise InputError(
            f"{path} is there and is no result of `polyroute evaluate`; name another --out file"
        )


def _table_of(scores: Sequence[TaskScore]) -> Table:
    table = Table("task", "metric", "score", "per token", "majority", "chance", "examples")
    for s in scores:
        table.add_row(
            escape(s.task), s.metric, f"{s.score:.3f}", _number(s.score_normalised),
            _number(s.majority), _number(s.chance), str(s.num_examples),
        )  # fmt: skip
    average = macro_average(scores)
    table.add_row(
        "mean over tasks", "", _number(average["score"]), "", _number(average["majority"]),
        _number(average["chance"]), "",
    )  # fmt: skip
    return table


def export_run(run: Path, task: str | None, out: Path, form: str = "peft") -> Result:
    """Write one task of a run as a PEFT adapter, or all of it for another program.

    Raises:
        InputError: the run or the task cannot be used, or the place cannot be written.
    """
    run = Path(locate(run))
    checkpoint = _inventory(run)
    check_export(out, form, task)
    base, _ = base_of(run)
    with loaded(base, checkpoint, run) as model:
        write_inventory(model, out, form, task)
    what = f"the inventory as {form}" if task is None else f"{task!r} as a PEFT adapter"
    return Result({"out": out, "format": form, "task": task}, (f"wrote {what} to {out}",))


def import_run(options: Mapping[str, Any]) -> Result:
    """Make a run of an inventory that another program trained.

    Args:
        options: of `polyroute import`, by name.

    Raises:
        InputError: an option, the checkpoint or the base model cannot be used.
    """
    source, names = options["source"], options["tasks_file"]
    place = {
        "resume": False,
        "overwrite": options["overwrite"],
        "inputs": (source, options["model"]),
    }
    folder = check_run(options["out"], "import", **place)
    tasks = None if names is None else read_names(names)
    base, tokenizer = load_base(options["model"], dtype=options["dtype"])
    kind_of(base, tokenizer, max_input=options["max_input"], max_target=options["max_target"])
    model = read_inventory(
        base, source, form=options["format"], tasks=tasks, allow_pickle=options["allow_pickle"]
    )
    open_run(folder, "import", **place)
    record(folder, "import", {**_plain(options), "method": model.adapter_config.method})
    with held(folder):
        model.save_pretrained(folder)
    return Result(
        {"out": folder, "tasks": model.tasks, "parameters": model.counts()},
        (model.describe(), f"imported {len(model.tasks)} tasks; the inventory is in {folder}"),
    )


def inspect_run(
    run: Path, data: str | None = None, reader: Mapping[str, Any] | None = None
) -> Result:
    """What a run holds and, given a suite, how routes relate to its categories.

    Raises:
        InputError: the folder holds no inventory; or, given a suite, it cannot be read, or the
            tasks have no routes or no categories to compare.
    """
    asked, run = run, Path(locate(run))
    checkpoint = _inventory(run)
    description = checkpoint.description
    document = {
        "run": asked,
        "config": description["config"],
        "base": {name: description["base"][name] for name in ("name", "class")},
        "skills": description["num_skills"],
        "sites": len(description["sites"]),
        "routers": len(description["routers"]),
        "tasks": checkpoint.tasks,
    }
    account = describe_checkpoint(checkpoint)
    categories: dict[str, str] | None = None
    if data is not None:
        suite = load_suite(data, reader)
        categories = {t: suite.info(t).category for t in checkpoint.tasks if t in suite.tasks}
    try:
        analysis = analyse(checkpoint, categories)
    except InputError:
        if categories is not None:
            raise
        return Result({**document, "routing": None}, (account,))
    result = {**document, "routing": analysis.to_dict()}
    if categories is None:
        return Result(result, (account,))
    relation = analysis.relation
    if relation is None:
        raise InputError(f"{data} groups the tasks of {run} into no categories that say something")
    related = (
        f"  {relation.tasks} tasks in {relation.categories} categories:\n"
        f"    adjusted Rand index of clusters by route: {relation.ari:.3f}\n"
        f"    nearest task is of the same category: {relation.purity:.3f} "
        f"(by chance {relation.chance:.3f}, p {relation.p:.4f})"
    )
    return Result(result, (account, related))


def push_run(
    run: Path,
    repository: str,
    *,
    private: bool,
    revision: str | None,
    message: str | None,
    license: str | None,
) -> Result:
    """Send the inventory of a run to the hub, with a model card.

    Raises:
        InputError: the run is not finished or is damaged, or the hub refuses.
    """
    _ = _inventory(run).tasks  # every file of the routing table is read
    card = write_card(run, name=repository, license=license)
    place = Repository(repository, revision)
    url = push(run, place, card, private=private or None, message=message)
    return Result({"repository": repository, "url": url}, (f"the inventory is on the hub: {url}",))


def _inventory(run: Path) -> Checkpoint:
    """The inventory of a run that is finished.

    Raises:
        InputError: the run is not finished, or its command leaves no inventory.
    """
    if (run / "run.json").is_file() and not (run / DESCRIPTION).exists():
        command = read_run(run)["command"]
        if command == "import":
            raise InputError(f"the import to {run} was interrupted; repeat it with --overwrite")
        if command != "train":
            raise InputError(f"{run} was written by `polyroute {command}`, not `polyroute train`")
        raise InputError(f"the run in {run} is unfinished; continue it with --resume")
    return read_checkpoint(run)


def base_of(
    run: str | os.PathLike[str], *, objective: str | Objective = "lm"
) -> tuple[Any, ModelKind]:
    """The base model that a run was trained on, and its kind, to learn by an objective."""
    options = _base_options(run)
    base, tokenizer = load_base(options["model"], dtype=options["dtype"])
    lengths = {name: options[name] for name in ("max_input", "max_target")}
    return base, kind_of(base, tokenizer, **lengths, objective=objective)


def _base_options(run: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run says of its base model: options of `polyroute train`, as `import` has them too.

    Raises:
        InputError: the folder is no run's, or the run says nothing of a base model.
    """
    config = {"dtype": "float32", **read_run(run)["config"]}
    kinds = {"model": str, "dtype": str, "max_input": int, "max_target": int}
    for name, kind in kinds.items():
        if name not in config:
            raise InputError(f"{run} was not written by `polyroute train`")
        if type(config[name]) is not kind:
            raise InputError(f"{Path(run) / 'run.json'} is damaged: {name} is {config[name]!r}")
    return {name: config[name] for name in kinds}


def _chosen(
    suite: Suite,
    names: Sequence[str] | None,
    default: Sequence[str],
    kind: ModelKind,
    *,
    none: str,
) -> tuple[str, ...]:
    """The tasks asked for; by default all that the kind can use; `none`: if there are no.

    Raises:
        InputError: there is no such task, or the kind cannot use it.
    """
    if kind.supports_generation:
        why, instead = "the objective compares them", "use --objective lm"
    else:
        why = "an encoder base model writes no text"
        instead = "use a text-generating base model"

    def usable(task: str) -> bool:
        return not kind.needs_choices or suite.info(task).has_choices

    if names is not None:
        tasks = check_tasks(suite, names)
        for task in tasks:
            if not usable(task):
                raise InputError(
                    f"task {task!r} has no choices, and {why}: leave the task out, or {instead}"
                )
        return tasks
    if not default:
        raise InputError(f"{none}; choose tasks with --tasks")
    able = [task for task in default if usable(task)]
    if not able:
        raise InputError(f"none of the {len(default)} tasks has choices, and {why}: {instead}")
    if len(able) < len(default):
        say(f"left out {len(default) - len(able)} tasks without choices: {why}")
    return check_tasks(suite, able)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values."""
    return {
        k: str(v) if isinstance(v, Path) or (isinstance(v, float) and math.isinf(v)) else v
        for k, v in options.items()
    }
