"""`polyroute train`: from options to a run folder with a trained inventory."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from polyroute.build import attach, from_checkpoint
from polyroute.config import MHRConfig
from polyroute.data.suite import training_tasks, validate
from polyroute.errors import InputError, fault_of, reason
from polyroute.host.files import finite, read_json, write_json
from polyroute.host.interrupts import deferred, resumable
from polyroute.host.output import Result, say
from polyroute.host.processes import connect, is_first, wait
from polyroute.loading import load_suite, use_fast_attention
from polyroute.model import RoutedModel
from polyroute.optimizers import summary
from polyroute.program.commands.checkpoints import TRAINER_STATE, last_checkpoint
from polyroute.program.commands.folder import RunFolder
from polyroute.program.commands.lengths import Measured, settled_lengths
from polyroute.program.commands.runs import BaseModel, inventory_of, load, settled
from polyroute.program.commands.tasks import chosen_tasks
from polyroute.program.commands.training import CheckFolder, SaveWhenStopped, make_trainer
from polyroute.program.commands.validation import with_validation
from polyroute.program.options.train import TrainOptions
from polyroute.program.plans import plan_of_training
from polyroute.saved.checkpoint import Checkpoint, read_checkpoint
from polyroute.saved.hub import locate
from polyroute.saved.metrics import METRICS, read_metrics
from polyroute.saved.prompting import NOTE
from polyroute.saved.runs import EXAMPLES, held
from polyroute.settings import option_of
from polyroute.study.alignment_callback import AlignmentCallback
from polyroute.study.examples import digest_of, encoded_mixture
from polyroute.study.groups import start_in_groups
from polyroute.study.routing_state import in_words
from polyroute.trainer import MultiTaskTrainer
from polyroute.training.divergence import check_finite
from polyroute.training.kept import kept_by
from polyroute.training.whole_run import samples_of_a_step

__all__ = ["begin_run", "train_run"]

ALIGNMENT = "alignment.json"
LONGEST_STEP = timedelta(minutes=30)
"""For which one process waits for the others in training."""


@dataclass(frozen=True)
class Start:
    """The run that training goes on from."""

    run: Path
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Checked:
    """A training of which all is known to be right and nothing is written."""

    trainer: MultiTaskTrainer
    tasks: tuple[str, ...]
    options: TrainOptions
    """With nothing left open."""
    folder: RunFolder
    config: Mapping[str, Any]
    """What `run.json` is to say."""

    def open(self) -> Path:
        """Make the folder of the run, or take it up again."""
        notes = {NOTE: self.trainer.kind.prompting.to_dict()}
        return self.folder.open(self.config, self.options.given, notes)


def train_run(options: TrainOptions) -> Result:
    """Train an inventory; the run folder can then be given to `polyroute.from_pretrained`.

    Returns:
        The metrics or, of a dry run, the plan.

    Raises:
        InputError: an option, the data or the base model cannot be used; nothing was trained.
    """
    connect(LONGEST_STEP)
    own = _checked(options)
    trainer, tasks = own.trainer, own.tasks
    if options.dry_run:
        own.folder.compare(own.config, own.options.given)
        return plan_of_training(trainer, own.options, tasks, own.folder.path)
    wait()  # nothing is written before all processes are prepared
    folder = own.open()
    with held(folder) as check, resumable(folder):
        is_over = options.resume and (folder / METRICS).exists()
        damage = fault_of(_check_end, folder) if is_over else None
        wait()  # all processes have looked before one of them writes
        if is_over and damage is None:
            say(f"the run in {folder} is finished; there is nothing to resume")
        else:
            last = last_checkpoint(folder) if options.resume else None
            if damage is not None:
                _say_restored(damage, last)
            say(trainer.model.describe())
            say(own.config["optimization"])
            trainer.add_callback(CheckFolder(check))
            _train_to_the_end(trainer, folder, last)
        metrics = read_metrics(folder)
    return Result(
        {"out": folder, "tasks": tasks, **{k: v for k, v in metrics.items() if k != "log"}},
        (
            f"trained {len(tasks)} tasks; {_validated(metrics)}the inventory is in {folder}",
            *filter(None, [in_words(metrics["log"])]),
        ),
    )


def begin_run(options: TrainOptions) -> Result:
    """Write a run as it is before its first step, so that what follows on it can be checked.

    Raises:
        InputError: see `train_run`.
    """
    own = _checked(options)
    folder = own.open()
    own.trainer.model.save_pretrained(folder)
    return Result({"out": folder, "tasks": own.tasks}, ())


def _checked(options: TrainOptions) -> Checked:
    start = _start(options)
    inputs = (options.model, options.start, options.source.data)
    if start is not None:
        options = _continued(options, start)
    folder = RunFolder("train", options.out, options, inputs)
    reading, given = settled(options.reading, options.given, folder.resumed)
    options = replace(options, reading=reading, given=given)
    folder.compare_given(given)
    trainer, tasks, options = _prepared(options, start, folder)
    config = {
        **options.given.recorded,
        "tasks": list(tasks),
        "optimization": summary(asdict(options.optimization)),
        EXAMPLES: digest_of(trainer.train_dataset),
    }
    return Checked(trainer, tasks, options, folder, config)


def _start(options: TrainOptions) -> Start | None:
    if options.start is None:
        return None
    run = Path(locate(options.start))
    return Start(run, inventory_of(run))


def _continued(options: TrainOptions, start: Start) -> TrainOptions:
    """The options with what the run says that training goes on from."""
    base = BaseModel.of(start.run)
    saved = start.checkpoint.description["config"]
    flags = {one.name: option_of(one) for one in fields(options.adapter)}
    adapter = {flags.get(name, name): value for name, value in saved.items()}
    recorded = {**options.given.recorded, **base.to_dict(), **adapter}
    given = replace(options.given, recorded=recorded)
    return replace(options, model=base.name, reading=base.reading, given=given)


def _prepared(
    options: TrainOptions, start: Start | None, folder: RunFolder
) -> tuple[MultiTaskTrainer, tuple[str, ...], TrainOptions]:
    """Everything up to the first step.

    Returns:
        The trainer, the tasks in the order of its rows, and the options with nothing left open.
    """
    suite = load_suite(options.source.data, options.source.reader)
    assert options.model is not None
    base, kind = load(BaseModel(options.model, options.reading), objective=options.objective)
    if options.bf16:
        use_fast_attention(base)
    tasks = chosen_tasks(
        suite, options.source.tasks, training_tasks(suite), kind,
        none=f"every task of {options.source.data} is held out",
    )  # fmt: skip
    validate(suite, tasks, needs=["train"])
    kind, reading, given = settled_lengths(
        base, kind, options.reading, options.given, Measured(suite, tasks, "train"), folder.resumed
    )
    options = replace(options, reading=reading, given=given)
    torch.manual_seed(options.seed)
    if start is None:
        model = _attached(base, options.adapter, tasks)
    else:
        model = from_checkpoint(base, start.checkpoint, str(start.run))
        model.check_phase(options.phase)
        model.add_tasks([task for task in tasks if task not in model.routes])
    model.set_phase(options.phase)
    rows = encoded_mixture(suite, tasks, "train", kind)
    validation = None
    if options.eval_steps is not None:
        rows, validation = with_validation(
            suite, tasks, rows, kind, options.max_eval, continued=start is not None
        )
    trainer = make_trainer(model, kind, options, rows, validation)
    whole = {"--group-tasks": options.group_tasks, "--alignment-steps": options.alignment_steps}
    for flag, value in whole.items():
        if value is not None and trainer.is_fsdp_enabled:
            raise InputError(f"{flag} needs a whole base model: leave it out under FSDP")
    is_resumed = options.resume and last_checkpoint(folder.path) is not None
    if options.group_tasks is not None and not (options.dry_run or is_resumed):
        start_in_groups(model, kind, rows, examples=options.group_tasks, seed=options.seed)
    if options.alignment_steps is not None:
        steps = options.alignment_steps
        place = folder.path / ALIGNMENT
        trainer.add_callback(AlignmentCallback(model, kind, rows, place, steps=steps))
    return trainer, tasks, options


def _attached(base: Any, adapter: MHRConfig, tasks: Sequence[str]) -> RoutedModel:
    """A fresh inventory on a base model.

    Raises:
        InputError: it cannot be made, or is too large.
    """
    try:
        return attach(base, adapter, tasks)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        why = reason(error)
        about_size = ("memory", "alloc", "overflow", "too large", "storage size", "dimension")
        if isinstance(error, RuntimeError | TypeError) and not any(
            w in why.lower() for w in about_size
        ):
            raise
        raise InputError(
            f"the inventory cannot be made: lower --skills or --rank ({why})"
        ) from error


def _check_end(folder: Path) -> None:
    """Make sure that the files which a finished training leaves are whole."""
    read_metrics(folder)
    read_checkpoint(folder).check_rows()


def _say_restored(damage: str, last: Path | None) -> None:
    """Say that what is damaged is written again.

    Raises:
        InputError: there is no checkpoint to write it from.
    """
    if last is None:
        raise InputError(
            f"{damage}; no checkpoint is left to restore the run from, so start again with "
            "--overwrite"
        )
    say(f"{damage}; restoring the end of the run from {last.name}")


def _train_to_the_end(trainer: MultiTaskTrainer, folder: Path, last: Path | None) -> None:
    """Train, from a checkpoint if there is one, and write the inventory and the metrics."""
    model = trainer.model
    found: Mapping[str, Any] = {}
    trainer.args.output_dir = str(folder)
    state: dict[str, Any] = {"global_step": -1} if last is None else read_json(last / TRAINER_STATE)
    if last is not None and state["global_step"] >= trainer.args.max_steps:
        model.load_adapter(last)  # it was interrupted between the last step and the end
        steps, log = state["global_step"], state["log_history"]
        found = _end_of(state, trainer)
        log = [*log, {**found, "step": steps}] if found else log
    else:
        # Of several processes only one would notice the signal, and the others would wait for it.
        alone = trainer.args.world_size == 1
        with deferred() if alone else nullcontext(bool) as is_stopped:
            trainer.add_callback(SaveWhenStopped(is_stopped))
            checkpoint = None if last is None else str(last)
            found = trainer.train(resume_from_checkpoint=checkpoint).metrics
        steps, log = trainer.state.global_step, trainer.state.log_history
    check_finite(model.learned(), steps)
    model.save_pretrained(folder, is_main_process=is_first())
    if is_first():
        metrics = {
            **_finite(found),
            **_finite(_last_validation(log)),
            "steps": steps,
            **({"skipped_steps": trainer.watch.skipped} if trainer.watch.skipped else {}),
            "parameters": model.counts(),
            "trained_parameters": model.num_trainable(),
            "log": [_finite(entry) for entry in log],
        }
        write_json(folder / METRICS, metrics)
    wait()


def _end_of(state: Mapping[str, Any], trainer: MultiTaskTrainer) -> dict[str, Any]:
    """What the trainer says at the end, from the state of the last checkpoint.

    Nothing if an older version wrote the checkpoint.
    """
    step, kept = state["global_step"], kept_by(state.get("stateful_callbacks"))
    if not kept:
        return {}
    trainer.watch.skipped = kept["skipped"]
    trainer.whole_run.go_on(kept, step, trainer.args.device)
    found = trainer.whole_run.metrics(step, samples_of_a_step(trainer.args))
    return {**found, **{key: state[key] for key in ("total_flos", "epoch") if key in state}}


def _last_validation(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last validation loss of a log, by its name; nothing where none was measured."""
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {"eval_loss": losses[-1]} if losses else {}


def _validated(metrics: Mapping[str, Any]) -> str:
    """The validation loss in words, where there is one."""
    loss = metrics.get("eval_loss")
    return "" if loss is None else f"the validation loss is {loss:.4g}; "


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a log as JSON values; a gradient norm can be infinite where the loss is not."""
    return {key: finite(value) for key, value in entry.items()}
