"""The command line: one function per command; its signature and docstring are its help."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from polyroute.errors import InputError, did_you_mean

__all__ = ["app", "main"]

SEEDS = 2**32
"""Seeds are below; numpy takes no others."""
MOST = 2**31 - 1
"""No whole number may be larger; torch and numpy cannot count further everywhere."""
TRAINING_PHASES = ("full", "mu")
"""The others start from an inventory that has learned something."""

app = typer.Typer(
    help="Train one inventory of LoRA skills on many tasks, and adapt it to new ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the entries of a YAML file the defaults of the command's options."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the config {path} is not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise InputError(f"the config {path} must hold `option: value` lines")
    known = {str(p.name) for p in context.command.params} - {"config"}
    flags = {str(p.name) for p in context.command.params if getattr(p, "is_flag", False)}
    several = {str(p.name) for p in context.command.params if getattr(p, "multiple", False)}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise InputError(
                f"config key {key!r} in {path} does not exist: {did_you_mean(name, known)}"
            )
        if isinstance(value, dict) or (isinstance(value, bool) and name not in flags):
            raise InputError(
                f"config key {key!r} in {path} cannot be {value!r}; if it is meant as text, put it "
                "in quotes"
            )
        is_list = isinstance(value, list)
        if name in several:
            defaults[name] = list(map(str, value)) if is_list else [str(value)]
        else:
            defaults[name] = ",".join(map(str, value)) if is_list else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=_read_config,
        help="YAML file with any of these options; the command line wins.",
    ),
]
Data = Annotated[str, typer.Option(help="Suite: a folder with one JSONL file per task.")]
Run = Annotated[Path, typer.Argument(help="Folder that `polyroute train` wrote.")]
TaskNames = Annotated[str | None, typer.Option(help="Task names, separated by commas.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the --out folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, plots and adapters.")] = Path(
        "demo-out"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the work, to see that it runs.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare shared, poly and mhr on a generated suite, end to end, in a few minutes.

    Needs no network and no GPU: the base model and the suite come with polyroute.

    Example: `polyroute demo --out demo-out`
    """
    from polyroute.demo.main import run_demo
    from polyroute.runs import check_run

    check_run(out, "demo", resume=False, overwrite=overwrite)
    run_demo(out, quick=quick, overwrite=overwrite)


@app.command()
def train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="Base model: folder, hub id, `demo`, or `package:NAME` (inside NAME)."),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    dtype: Annotated[
        str, typer.Option(help="Of the base model: float32, bfloat16 or float16.")
    ] = "float32",
    tasks: TaskNames = None,
    method: Annotated[str, typer.Option(help="mhr, poly, shared or private.")] = "mhr",
    adapter: Annotated[str, typer.Option(help="lora or ia3.")] = "lora",
    skills: Annotated[int | None, typer.Option(help="Skills in the inventory [8].")] = None,
    heads: Annotated[int | None, typer.Option(help="Routing heads, for mhr [8].")] = None,
    rank: Annotated[int, typer.Option(help="Rank of a skill.")] = 4,
    alpha: Annotated[float | None, typer.Option(help="Scale is alpha / rank [rank].")] = None,
    target: Annotated[
        str, typer.Option(help="all-linear, a regular expression, or endings: `q,v`.")
    ] = "all-linear",
    exclude: Annotated[str | None, typer.Option(help="Layers to leave out, as --target.")] = None,
    granularity: Annotated[
        str,
        typer.Option(help="finegrained, layerwise, blockwise, coderwise or coarsegrained."),
    ] = "finegrained",
    init: Annotated[str, typer.Option(help="Initial A: mttl or peft.")] = "mttl",
    gate: Annotated[
        str, typer.Option(help="sigmoid, relaxed_bernoulli or straight_through.")
    ] = "sigmoid",
    normalization: Annotated[str, typer.Option(help="sum, l2 or average_correction.")] = "sum",
    dropout: Annotated[float, typer.Option(help="Dropout of the adapter's input.")] = 0.0,
    phase: Annotated[str, typer.Option(help="full or mu.")] = "full",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Examples in a step on one device.")] = 32,
    accumulation: Annotated[int, typer.Option(help="Micro-batches added up in a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of the skills.")] = 1e-3,
    route_lr: Annotated[float, typer.Option(help="Learning rate of the routing.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of the skills; routing has none.")] = 0.0,
    rowwise: Annotated[
        bool,
        typer.Option("--rowwise", help="Step only the batch's tasks; for thousands of tasks."),
    ] = False,
    warmup: Annotated[float, typer.Option(help="Share of steps that warm up.")] = 0.06,
    temperature: Annotated[
        float, typer.Option(help="Task sampling: 1 by size, inf equally often.")
    ] = 1.0,
    cap: Annotated[int | None, typer.Option(help="Size above which a task counts no more.")] = None,
    max_input: Annotated[int, typer.Option(help="Most tokens of a prompt.")] = 256,
    max_target: Annotated[int, typer.Option(help="Most tokens of a target.")] = 64,
    seed: Annotated[int, typer.Option(help="Of initialisation and sampling.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Save memory: recompute activations.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, wandb ...")] = "none",
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
) -> None:
    """Train an inventory and its routing on the training tasks of a suite.

    Example: `polyroute train --model demo --data SUITE --method mhr --skills 8 --heads 16 --rank 4
    --out runs/mhr`
    """
    from polyroute.commands import train_run

    options = dict(context.params)
    options["target"] = _target(target)
    options["exclude"] = None if exclude is None else _target(exclude)
    options["tasks"] = _names(tasks)
    _positive(
        steps=steps, batch_size=batch_size, accumulation=accumulation, lr=lr, route_lr=route_lr,
        temperature=temperature, save_steps=save_steps, max_input=max_input, max_target=max_target,
    )  # fmt: skip
    _check_training(phase, weight_decay, warmup, cap, seed)
    train_run(options)


@app.command()
def adapt(
    context: typer.Context,
    run: Run,
    data: Data,
    tasks: TaskNames = None,
    shots: Annotated[int, typer.Option(help="Training examples of each new task.")] = 32,
    phase: Annotated[str, typer.Option(help="full, z, mu, mu-uncollapsed or random.")] = "mu",
    seeds: Annotated[str, typer.Option(help="One draw and one training each.")] = "42,1024,0",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of the skills.")] = 3e-3,
    route_lr: Annotated[float, typer.Option(help="Learning rate of the routing.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of the skills.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw, adafactor or sgd.")] = "adamw",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which rates rise.")] = 0.06,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = 1.0,
    init: Annotated[
        str, typer.Option(help="`uniform`, or a task whose route to copy.")
    ] = "uniform",
    validation_shots: Annotated[
        int, typer.Option(help="More examples of each task, whose loss chooses the best step.")
    ] = 0,
    eval_steps: Annotated[int, typer.Option(help="Steps between looks at them.")] = 10,
    patience: Annotated[
        int | None, typer.Option(help="Looks without a better loss before stopping early.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="Try several values: route_lr=0.03,0.1. Repeat for more settings."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="For adaptations side by side, such as 8GB [half of what is free]."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to score on.")] = "test",
    out: Annotated[
        Path | None, typer.Option(help="Folder of results [RUN/adapt-PHASE-SHOTS].")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
) -> None:
    """Adapt a trained inventory to new tasks from a few examples, and score the result.

    Without --tasks, or with `--tasks all`: all held-out tasks of the suite. All tasks, seeds and
    settings are adapted side by side, each (up to rounding) as alone. Every adapted task is also
    written as an ordinary PEFT LoRA.

    Example: `polyroute adapt runs/mhr --data SUITE --tasks boolq,conjnli --shots 32 --phase mu
    --seeds 42,1024,0`
    """
    from polyroute.commands import adapt_run

    options = dict(context.params)
    options["tasks"] = None if tasks == "all" else _names(tasks)
    options["seeds"] = _seeds(seeds)
    options["grid"] = _grid(grid or [])
    options["out"] = out or run / f"adapt-{phase}-{shots}"
    adapt_run(options)


@app.command()
def evaluate(
    run: Run,
    data: Data,
    tasks: TaskNames = None,
    zero_shot: Annotated[
        bool,
        typer.Option("--zero-shot", help="Route every task as the average of the skills."),
    ] = False,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Examples in a forward.")] = 32,
    out: Annotated[Path | None, typer.Option(help="JSON file [RUN/evaluate-SPLIT.json].")] = None,
    config: Config = None,
) -> None:
    """Score a run on tasks of a suite: its training tasks, or with --zero-shot the held-out ones.

    Example: `polyroute evaluate runs/mhr --data SUITE --tasks boolq --zero-shot`
    """
    from polyroute.commands import evaluate_run

    _positive(batch_size=batch_size)
    evaluate_run(run, data, _names(tasks), zero_shot, split, batch_size, out)


@app.command()
def export(
    run: Run,
    task: Annotated[str, typer.Option(help="Task name, or `mu` for the average of the skills.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
) -> None:
    """Write one task as an ordinary PEFT LoRA, equal in function.

    Example: `polyroute export runs/mhr --task mnli --out out/mnli`
    """
    from polyroute.commands import export_run

    export_run(run, task, out)


@app.command()
def inspect(run: Run) -> None:
    """Show what a run holds: sizes, tasks, and which skills they use.

    Reads the run alone; the base model is not needed.

    Example: `polyroute inspect runs/mhr`
    """
    from polyroute.commands import inspect_run

    inspect_run(run)


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task; give names separated by commas")
    return names


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in str(text).split(",")]
    except ValueError as error:
        raise InputError(
            f"--seeds {text!r} must be whole numbers separated by commas, such as 42,1024,0"
        ) from error
    if len(set(seeds)) != len(seeds) or not all(0 <= seed < SEEDS for seed in seeds):
        raise InputError(f"--seeds {text!r} must be different numbers from 0 to {SEEDS - 1}")
    return seeds


def _grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`lr=0.001,0.01` as the name of a setting and its values."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values.strip():
            raise InputError(f"--grid {text!r} must be a setting and values: route_lr=0.03,0.1")
        if name in found:
            raise InputError(f"--grid names {name!r} twice; give all of its values at once")
        found[name] = [_value(value.strip()) for value in values.split(",")]
    return found


def _value(text: str) -> Any:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _target(text: str) -> str | list[str]:
    """Plain names, separated by commas, as a list; anything else is a regular expression."""
    parts = [part.strip() for part in text.split(",")]
    plain = all(part.replace("_", "").replace(".", "").isalnum() for part in parts)
    return parts if plain and text != "all-linear" else text


def _positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0 or (math.isinf(value) and name != "temperature"):
            raise InputError(
                f"--{name.replace('_', '-')} must be positive and finite, not {value:g}"
            )
        if isinstance(value, int) and value > MOST:
            raise InputError(f"--{name.replace('_', '-')} must be at most {MOST}, not {value}")


def _check_training(
    phase: str, weight_decay: float, warmup: float, cap: int | None, seed: int
) -> None:
    if phase not in TRAINING_PHASES:
        raise InputError(f"unknown phase {phase!r} of training; use full or mu")
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"--weight-decay must be finite and not negative, not {weight_decay:g}")
    if not 0 <= warmup < 1:
        raise InputError(f"--warmup must be at least 0 and below 1, not {warmup:g}")
    if cap is not None:
        _positive(cap=cap)
    if not 0 <= seed < SEEDS:
        raise InputError(f"--seed must be from 0 to {SEEDS - 1}, not {seed}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in one sentence and exit code 2."""
    try:
        app(args=arguments)
    except SystemExit as finished:  # click exits after every command, also after a good one
        if finished.code:
            raise
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}")


def _fail(message: str) -> None:
    print(f"polyroute: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
