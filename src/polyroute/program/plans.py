"""Plans: what a command would do, as `--dry-run` shows it before anything long starts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.adapting.memory import Budget, bytes_in_training
from polyroute.adapting.settings import AdaptSettings
from polyroute.data.suite import Suite
from polyroute.host.output import Result
from polyroute.model import RoutedModel
from polyroute.optimizers import summary
from polyroute.program.options.train import TrainOptions
from polyroute.saved.hub import DESCRIPTION, SKILLS
from polyroute.study.examples import task_sizes
from polyroute.trainer import MultiTaskTrainer

__all__ = ["AdaptationPlan", "plan_of_adapting", "plan_of_training"]

ROWS_SHOWN = 100
"""The JSON document has all rows."""


def plan_of_training(
    trainer: MultiTaskTrainer, options: TrainOptions, tasks: Sequence[str], folder: Path
) -> Result:
    """What `polyroute train` would do.

    Args:
        trainer: ready to train.
        options: the options of the command.
        tasks: the tasks, in the order of the trainer's rows.
        folder: the folder of the run.
    """
    model, args = trainer.model, trainer.args
    optimization = summary(asdict(options.optimization))
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    seen = batch * args.max_steps
    sizes = task_sizes(trainer.train_dataset)
    shares = trainer.sampler.probabilities.tolist()
    rows = [
        {"task": task, "examples": size, "seen": share * seen}
        for task, size, share in zip(tasks, sizes, shares, strict=True)
    ]
    memory = bytes_in_training(model, args.optim == "adafactor", rowwise=args.rowwise_routes)
    checkpoints = f"checkpoint-N (every {args.save_steps} steps; the last two stay)"
    written = ["run.json", "metrics.json", DESCRIPTION, SKILLS, checkpoints]
    if model.routes.shape is not None:
        written.append("routes-*.safetensors")
    if options.alignment_steps is not None:
        written.append("alignment.json")
    document = {
        "out": folder,
        "adapter": model.adapter_config.to_dict(),
        "sites": len(model.sites),
        "routers": 0 if model.routes.shape is None else model.routes.shape[0],
        "parameters": model.counts(),
        "trained_parameters": model.num_trainable(),
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "max_input": options.reading.max_input,
        "max_target": options.reading.max_target,
        "optimization": optimization,
        "steps": args.max_steps,
        "examples_per_step": batch,
        "examples": seen,
        "tasks": rows,
        "writes": written,
    }
    columns = ("task", "examples", "seen in training", "times each")
    cells = (
        (r["task"], f"{r['examples']:,}", f"{r['seen']:,.0f}", f"{r['seen'] / r['examples']:.2f}")
        for r in rows
    )
    shown = (
        model.describe(),
        f"phase {args.phase} trains {model.num_trainable():,} parameters",
        f"memory on each device: {_sizes(memory)}; activations come on top",
        optimization,
        f"{args.max_steps:,} steps of {batch:,} examples: {seen:,} examples of {len(rows)} tasks",
        _table(columns, cells, len(rows)),
        f"would write to {folder}: {', '.join(written)}",
        "nothing was written",
    )
    return Result(document, shown)


@dataclass(frozen=True)
class AdaptationPlan:
    """What is to be adapted to, as far as a plan shows it."""

    tasks: Sequence[str]
    choices: Mapping[str, AdaptSettings]
    """Settings by label, all of one phase."""
    seeds: Sequence[int]
    split: str
    """What results are scored on."""
    max_examples: int | None
    """The most examples of each task to score on; None for all."""
    folder: Path
    """Where results go."""

    def rows(self, suite: Suite) -> list[dict[str, Any]]:
        """For each task and setting, how many examples there are and how many are used."""
        rows: list[dict[str, Any]] = []
        for task in self.tasks:
            examples = len(suite.split(task, "train"))
            scored = len(suite.split(task, self.split))
            for label, choice in self.choices.items():
                shots = examples - choice.validation_shots if choice.shots is None else choice.shots
                rows.append(
                    {
                        "task": task,
                        "label": label,
                        "examples": examples,
                        "shots": shots,
                        "validation_shots": choice.validation_shots,
                        "steps": choice.steps,
                        "seen": choice.steps * min(choice.batch_size, shots),
                        "scored_on": min(scored, self.max_examples or scored),
                    }
                )
        return rows


def plan_of_adapting(
    model: RoutedModel, suite: Suite, budget: Budget, planned: AdaptationPlan
) -> Result:
    """What `polyroute adapt` would do.

    Args:
        model: the inventory.
        suite: where the tasks are.
        budget: what fits into memory.
        planned: what is to be done.
    """
    counts, seeds, tasks = model.counts(), planned.seeds, planned.tasks
    choices, folder = planned.choices, planned.folder
    phase = next(iter(choices.values())).phase
    trained = {"z": "new_task_z", "mu": "one_adapter", "mu-uncollapsed": "inventory"}
    parameters = counts[trained.get(phase, "new_task_full")]
    slots = len(tasks) * len(seeds) * len(choices)
    at_a_time = min(slots, budget.slots)
    steps = len(tasks) * len(seeds) * sum(choice.steps for choice in choices.values())
    rows = planned.rows(suite)
    written = [
        "run.json", "results.json", "TASK/seed-SEED/adapter_model.safetensors",
        "TASK/seed-SEED/adapter_config.json",
    ]  # fmt: skip
    document = {
        "out": folder,
        "phase": phase,
        "sites": len(model.sites),
        "routers": 0 if model.routes.shape is None else model.routes.shape[0],
        "parameters": counts,
        "trained_parameters": parameters,
        "seeds": seeds,
        "slots": slots,
        "slots_at_a_time": at_a_time,
        "tokens_at_a_time": budget.tokens,
        "steps": steps,
        "settings": {label: choice.to_dict() for label, choice in choices.items()},
        "tasks": rows,
        "writes": written,
    }
    columns = ("task", "setting", "examples", "shots", "steps", "seen by a slot", "scored on")
    numbers = ("examples", "shots", "steps", "seen", "scored_on")
    cells = ((r["task"], r["label"], *(f"{r[name]:,}" for name in numbers)) for r in rows)
    shown = (
        model.describe(),
        f"phase {phase} trains {parameters:,} parameters in each slot",
        f"{slots} slots: {len(tasks)} tasks, {len(seeds)} seeds, {len(choices)} settings; "
        f"{steps:,} steps in all",
        f"{at_a_time} slots and {budget.tokens:,} tokens at a time, by the memory for them",
        *dict.fromkeys(choice.optimization for choice in choices.values()),
        _table(columns, cells, len(rows)),
        f"would write to {folder}: {', '.join(written)}",
        "nothing was written",
    )
    return Result(document, shown)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], count: int) -> Table:
    table = Table(*columns)
    for row in islice(rows, ROWS_SHOWN):
        table.add_row(*map(escape, row))
    if count > ROWS_SHOWN:
        table.add_row(f"and {count - ROWS_SHOWN} more")
    return table


def _sizes(memory: Mapping[str, int]) -> str:
    parts = [f"{name.replace('_', ' ')} {number / 1e6:,.1f} MB" for name, number in memory.items()]
    return f"{sum(memory.values()) / 1e6:,.1f} MB ({', '.join(parts)})"
