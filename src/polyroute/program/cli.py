"""The command line: one function per command; its signature and docstring are its help."""

import functools
import inspect as inspecting
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from polyroute.errors import InputError, did_you_mean
from polyroute.host import output
from polyroute.host.interrupts import Terminated, terminable
from polyroute.host.yaml_files import read_yaml
from polyroute.program.recipes import read_recipe, recipe_names, shipped

__all__ = ["app", "main"]

SEEDS = 2**32
"""Seeds are below; numpy takes no others."""
MOST = 2**31 - 1
"""No whole number may be larger; torch and numpy cannot count further everywhere."""
TRAINING_PHASES = ("full", "mu")
CONTINUED_PHASES = ("z", "mu-uncollapsed")
"""They start from an inventory that has learned something."""
FROM_START = (
    "model", "dtype", "max_input", "max_target", "method", "adapter", "skills", "heads", "rank",
    "alpha", "target", "exclude", "granularity", "init", "gate", "normalization", "dropout",
    "logit_dropout", "shared_skill", "anneal_steps",
)  # fmt: skip
"""Options of training that cannot change when it goes on from another run."""
TRAINING_OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("linear", "constant")

DONE, FAILED, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes."""
EXIT_CODES = """Exit codes: 0 done; 1 it failed; 2 something given cannot be used, as one sentence
on standard error says; 130 ended by Ctrl-C, 143 by SIGTERM."""
USAGE_ERROR: Any = typer.BadParameter.__base__
"""Of an option or argument that does not exist, is missing or is malformed."""

app = typer.Typer(
    help="Train one inventory of LoRA skills on many tasks, and adapt it to new ones.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _switch(name: str) -> Callable[[bool], None]:
    """What an option of every command does: it changes how the command prints."""

    def switch(is_on: bool) -> None:
        if is_on:
            setattr(output.mode, name, True)

    return switch


def _everywhere(name: str, *more: str, help: str) -> Any:
    return typer.Option(
        f"--{name}", *more, is_eager=True, expose_value=False, callback=_switch(name), help=help,
        rich_help_panel="Output",
    )  # fmt: skip


Json = Annotated[
    bool, _everywhere("json", help="Print the result as one JSON document; see docs/cli.md.")
]
Quiet = Annotated[bool, _everywhere("quiet", "-q", help="Print results alone.")]
Verbose = Annotated[
    bool,
    _everywhere("verbose", "-v", help="Print what libraries say, and where a failure happened."),
]


@app.callback()
def _options(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    pass


def _command(name: str | None = None) -> Callable[[Callable[..., output.Result]], Any]:
    """Makes a function a command, with the options that all have, which prints its result."""
    common = inspecting.signature(_options).parameters

    def register(function: Callable[..., output.Result]) -> Callable[..., output.Result]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            for name in common:
                given.pop(name)
            try:
                with output.running():
                    result = function(**given)
            except KeyboardInterrupt as stop:
                if output.mode.depth:
                    raise
                raise _Stopped(stop) from None
            output.show(result)

        signature = inspecting.signature(function)
        parameters = [*signature.parameters.values(), *common.values()]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, epilog=EXIT_CODES)(run)
        return function

    return register


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A command was interrupted; as an error that passes through typer."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__("; ".join(["interrupted", *map(str, stop.args)]))
        self.code = TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _known(*values: str | Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """Completes to one of these values, or of those that a function knows."""

    def complete(incomplete: str) -> list[str]:
        known = [name for v in values for name in ([v] if isinstance(v, str) else v())]
        return [name for name in known if name.startswith(incomplete)]

    return complete


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the entries of a YAML file the defaults of the command's options."""
    if path is not None:
        values = read_yaml(path, f"the config {path}")
        defaults = _defaults(context.command, values, f"config key {{!r}} in {path}")
        context.default_map = {**(context.default_map or {}), **defaults}
        context.meta["polyroute.config"] = (path, frozenset(defaults))
    return path


def _read_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make what a recipe says the defaults, where no config says otherwise."""
    if name is not None:
        command = context.command
        values = read_recipe(name)[str(command.name)]
        defaults = _defaults(command, values, f"{command.name} key {{!r}} of the recipe {name}")
        context.default_map = {**defaults, **(context.default_map or {})}
    return name


def _defaults(command: Any, values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Options as a file gives them, as defaults of a command.

    Args:
        command: whose options they are.
        values: by the names of options, with hyphens or underscores.
        where: begins the sentence of an error; the key goes into its braces.
    """
    options = {str(p.name): p for p in command.params if p.name not in ("config", "help")}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise InputError(f"{where.format(key)} does not exist: {did_you_mean(name, options)}")
        option = options[name]
        is_flag = getattr(option, "is_flag", False)
        is_unset = value is None and option.default is not None
        if isinstance(value, dict) or is_unset or (isinstance(value, bool) and not is_flag):
            raise InputError(
                f"{where.format(key)} cannot be {value!r}; if it is meant as text, put it in quotes"
            )
        is_list = isinstance(value, list)
        if getattr(option, "multiple", False):
            defaults[name] = list(map(str, value)) if is_list else [str(value)]
        else:
            defaults[name] = ",".join(map(str, value)) if is_list else value
    return defaults


Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=_read_config,
        help="YAML file with any of these options; the command line wins.",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        is_eager=True,
        callback=_read_recipe,
        autocompletion=_known(recipe_names),
        help="Published settings as defaults: paper, paper-t0, paper-superni, or a YAML file.",
    ),
]
Reader = Annotated[
    list[str] | None,
    typer.Option(help="Option of the suite's reader, such as seed=1024. Repeat for more."),
]
Data = Annotated[
    str,
    typer.Option(
        help="Suite: a folder of JSONL, CSV or Parquet files, a YAML file of hub data sets, or a "
        "copy of Super-NaturalInstructions or P3; see docs/data.md."
    ),
]
Run = Annotated[
    Path,
    typer.Argument(
        help="Folder that `polyroute train` wrote, or where there is none an id on the hub: "
        "user/inventory, or user/inventory@revision."
    ),
]
Dtype = Annotated[str, typer.Option(help="Of the base model: float32, bfloat16 or float16.")]
MaxInput = Annotated[int, typer.Option(help="Most tokens of a prompt.")]
MaxTarget = Annotated[int, typer.Option(help="Most tokens of a target.")]
TaskNames = Annotated[str | None, typer.Option(help="Task names, separated by commas.")]
ScaleParameter = Annotated[
    bool,
    typer.Option(
        "--scale-parameter/--no-scale-parameter",
        help="Of adafactor: steps in proportion to the size of what they change.",
    ),
]
MaxGradNorm = Annotated[float, typer.Option(help="All gradients together are clipped to it.")]
RouteWeightDecay = Annotated[
    float, typer.Option(help="Of the routing: pulls it to the uniform mixture.")
]
Objective = Annotated[
    str,
    typer.Option(
        help="What is learned: lm, t-few (compares choices) or superni (smoothed).",
        autocompletion=_known("lm", "t-few", "superni"),
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, print the plan, and write nothing."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the --out folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]


@_command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, plots and adapters.")] = Path(
        "demo-out"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the work, to see that it runs.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> output.Result:
    """Compare shared, poly and mhr on a generated suite, end to end, in a few minutes.

    Needs no network and no GPU: the base model and the suite come with polyroute.

    Example: `polyroute demo --out demo-out`
    """
    from polyroute.demo.main import run_demo
    from polyroute.saved.runs import check_run

    check_run(out, "demo", resume=resume, overwrite=overwrite)
    return run_demo(out, quick=quick, resume=resume, overwrite=overwrite)


@_command()
def train(
    context: typer.Context,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    model: Annotated[
        str | None,
        typer.Option(help="Base model: folder, hub id, `demo`, or `package:NAME` (inside NAME)."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Go on from the inventory of this run; it says what is trained on what."),
    ] = None,
    dtype: Dtype = "float32",
    tasks: TaskNames = None,
    reader: Reader = None,
    method: Annotated[
        str,
        typer.Option(
            help="mhr, poly, shared or private.",
            autocompletion=_known("mhr", "poly", "shared", "private"),
        ),
    ] = "mhr",
    adapter: Annotated[
        str, typer.Option(help="lora or ia3.", autocompletion=_known("lora", "ia3"))
    ] = "lora",
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
        typer.Option(
            help="finegrained, layerwise, blockwise, coderwise or coarsegrained.",
            autocompletion=_known(
                "finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"
            ),
        ),
    ] = "finegrained",
    init: Annotated[str, typer.Option(help="Initial A: mttl or peft.")] = "mttl",
    gate: Annotated[
        str,
        typer.Option(
            help="sigmoid, relaxed_bernoulli or straight_through.",
            autocompletion=_known("sigmoid", "relaxed_bernoulli", "straight_through"),
        ),
    ] = "sigmoid",
    normalization: Annotated[
        str,
        typer.Option(
            help="sum, l2 or average_correction.",
            autocompletion=_known("sum", "l2", "average_correction"),
        ),
    ] = "sum",
    logit_dropout: Annotated[
        float, typer.Option(help="Probability with which a gate is dropped in training.")
    ] = 0.0,
    shared_skill: Annotated[
        bool, typer.Option("--shared-skill", help="The last skill is always on, for every task.")
    ] = False,
    anneal_steps: Annotated[
        int, typer.Option(help="Last steps, over which routing moves to the uniform mixture.")
    ] = 0,
    dropout: Annotated[float, typer.Option(help="Dropout of the adapter's input.")] = 0.0,
    phase: Annotated[
        str,
        typer.Option(
            help="full or mu; with --start also z or mu-uncollapsed.",
            autocompletion=_known(*TRAINING_PHASES, *CONTINUED_PHASES),
        ),
    ] = "full",
    objective: Objective = "lm",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Examples in a step on one device.")] = 32,
    accumulation: Annotated[int, typer.Option(help="Micro-batches added up in a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of the skills.")] = 1e-3,
    route_lr: Annotated[float, typer.Option(help="Learning rate of the routing.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of the skills.")] = 0.0,
    route_weight_decay: RouteWeightDecay = 0.0,
    optimizer: Annotated[
        str,
        typer.Option(help="adamw or adafactor.", autocompletion=_known(*TRAINING_OPTIMIZERS)),
    ] = "adamw",
    scale_parameter: ScaleParameter = True,
    max_grad_norm: MaxGradNorm = 1.0,
    rowwise: Annotated[
        bool,
        typer.Option("--rowwise", help="Step only the batch's tasks; for thousands of tasks."),
    ] = False,
    warmup: Annotated[float, typer.Option(help="Share of steps that warm up.")] = 0.06,
    schedule: Annotated[
        str, typer.Option(help="Of the rates after that: linear (down to 0) or constant.")
    ] = "linear",
    temperature: Annotated[
        float, typer.Option(help="Task sampling: 1 by size, inf equally often.")
    ] = 1.0,
    cap: Annotated[int | None, typer.Option(help="Size above which a task counts no more.")] = None,
    max_input: MaxInput = 256,
    max_target: MaxTarget = 64,
    seed: Annotated[int, typer.Option(help="Of initialisation and sampling.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Save memory: recompute activations.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    alignment_steps: Annotated[
        int | None,
        typer.Option(help="Steps between measurements of gradient alignment, such as 200 [none]."),
    ] = None,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, wandb ...")] = "none",
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    recipe: Recipe = None,
    config: Config = None,
) -> output.Result:
    """Train an inventory and its routing on the training tasks of a suite.

    Example: `polyroute train --model demo --data SUITE --method mhr --skills 8 --heads 16 --rank 4
    --out runs/mhr`
    """
    from polyroute.program.commands import train_run

    options = dict(context.params)
    options["target"] = _target(target)
    options["exclude"] = None if exclude is None else _target(exclude)
    options["tasks"] = _names(tasks)
    options["reader"] = _reader(reader or [])
    _positive(
        steps=steps, batch_size=batch_size, accumulation=accumulation, lr=lr, route_lr=route_lr,
        temperature=temperature, save_steps=save_steps, max_input=max_input, max_target=max_target,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    _check_start(context, model, start)
    _check_training(phase, warmup, cap, seed, is_fresh=start is None)
    _not_negative(weight_decay=weight_decay, route_weight_decay=route_weight_decay)
    _check_optimizer(optimizer, schedule, scale_parameter=scale_parameter, rowwise=rowwise)
    if anneal_steps > steps:
        raise InputError(f"--anneal-steps {anneal_steps} is more than the {steps} of --steps")
    options["alignment_steps"] = alignment_steps or None
    if alignment_steps:
        _positive(alignment_steps=alignment_steps)
    return train_run(options)


@_command()
def adapt(
    context: typer.Context,
    run: Run,
    data: Data,
    tasks: TaskNames = None,
    reader: Reader = None,
    shots: Annotated[int, typer.Option(help="Training examples of each new task.")] = 32,
    phase: Annotated[
        str,
        typer.Option(
            help="full, z, mu, mu-uncollapsed or random.",
            autocompletion=_known("full", "z", "mu", "mu-uncollapsed", "random"),
        ),
    ] = "mu",
    objective: Objective = "lm",
    seeds: Annotated[str, typer.Option(help="One draw and one training each.")] = "42,1024,0",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of the skills.")] = 1e-3,
    route_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the routing [1 in phase z, else 0.1].")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of the skills.")] = 0.0,
    route_weight_decay: RouteWeightDecay = 0.0,
    optimizer: Annotated[
        str,
        typer.Option(
            help="adamw, adafactor or sgd.", autocompletion=_known(*TRAINING_OPTIMIZERS, "sgd")
        ),
    ] = "adamw",
    scale_parameter: ScaleParameter = True,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which rates rise.")] = 0.06,
    max_grad_norm: MaxGradNorm = 1.0,
    init: Annotated[
        str,
        typer.Option(help="Start: `uniform`, `nearest` (the best training tasks), or a task."),
    ] = "uniform",
    validation_shots: Annotated[
        int, typer.Option(help="More examples of each task, whose loss chooses the best step.")
    ] = 0,
    eval_steps: Annotated[int, typer.Option(help="Steps between looks at them.")] = 10,
    choose_by: Annotated[
        str,
        typer.Option(
            help="What chooses: their loss or score; or test_score, as published T0 runs do."
        ),
    ] = "loss",
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
    dry_run: DryRun = False,
    recipe: Recipe = None,
    config: Config = None,
) -> output.Result:
    """Adapt a trained inventory to new tasks from a few examples, and score the result.

    Without --tasks, or with `--tasks all`: all held-out tasks of the suite. All tasks, seeds and
    settings are adapted side by side, each (up to rounding) as alone. Every adapted task is also
    written as an ordinary PEFT LoRA.

    Example: `polyroute adapt runs/mhr --data SUITE --tasks boolq,conjnli --shots 32 --phase mu
    --seeds 42,1024,0`
    """
    from polyroute.program.commands import adapt_run

    options = dict(context.params)
    options["tasks"] = None if tasks == "all" else _names(tasks)
    options["reader"] = _reader(reader or [])
    options["seeds"] = _seeds(seeds)
    options["grid"] = _grid(grid or [])
    options["out"] = out or _beside(run) / f"adapt-{phase}-{shots}"
    return adapt_run(options)


@_command()
def evaluate(
    run: Run,
    data: Data,
    tasks: TaskNames = None,
    reader: Reader = None,
    zero_shot: Annotated[
        bool,
        typer.Option("--zero-shot", help="Route every task as the average of the skills."),
    ] = False,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Examples in a forward.")] = 32,
    out: Annotated[Path | None, typer.Option(help="JSON file [RUN/evaluate-SPLIT.json].")] = None,
    config: Config = None,
) -> output.Result:
    """Score a run on tasks of a suite: its training tasks, or with --zero-shot the held-out ones.

    Example: `polyroute evaluate runs/mhr --data SUITE --tasks boolq --zero-shot`
    """
    from polyroute.program.commands import evaluate_run

    _positive(batch_size=batch_size)
    if out is None:
        _beside(run)
    options = _reader(reader or [])
    return evaluate_run(run, data, _names(tasks), zero_shot, split, batch_size, out, options)


@_command()
def reproduce(
    preset: Annotated[
        str,
        typer.Argument(
            help="suite, superni or t0.",
            autocompletion=_known(functools.partial(shipped, "presets")),
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results; each method has one in it.")],
    model: Annotated[str | None, typer.Option(help="Base model [the paper's].")] = None,
    data: Annotated[str | None, typer.Option(help="Suite, in the format of the preset.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Of the preset, separated by commas [all].")
    ] = None,
    selection: Annotated[
        str,
        typer.Option(help="Of the best step: separate, or paper as published, some on test data."),
    ] = "separate",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a value: train.steps=3, seeds=[0]. Repeat for more."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the work and one seed, to see that it runs.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> output.Result:
    """Run the paper's experiments: train every method, adapt it in every phase, compare.

    Everything is checked before anything is trained. Stages that are done are not done again.

    Example: `polyroute reproduce t0 --data T0 --methods mhr,poly,shared --out runs/t0`
    """
    from polyroute.program.reproduce import reproduce as run_preset

    return run_preset(
        preset, out, _checked, model=model, data=data,
        methods=None if methods is None else [name.strip() for name in methods.split(",")],
        selection=selection, settings=_settings(set_ or []), quick=quick, resume=resume,
        overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip


def _checked(name: str, options: Mapping[str, Any]) -> Callable[[], None]:
    """Check the options of a command; what is returned runs it."""
    command: Any = typer.main.get_command(app)
    command = command.commands[name]
    defaults = _defaults(command, options, f"option {{!r}} of polyroute {name}")
    context = command.make_context(name, [], default_map=defaults)
    if name == "adapt":  # which checks its settings when it begins: after all of training
        from polyroute.adapting.settings import AdaptSettings

        AdaptSettings(**{f.name: context.params[f.name] for f in fields(AdaptSettings)})

    def run() -> None:
        with context:
            command.invoke(context)

    return run


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """`train.steps=3` as a place in a preset and its value, which is YAML."""
    found: dict[str, Any] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text!r} must be a place and its value: train.steps=3")
        try:
            found[place.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {text!r}: the value is not valid YAML") from error
    return found


@_command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write to; for mttl also a name.ckpt.")],
    task: Annotated[
        str | None,
        typer.Option(help="Task name, or `mu` for the average of the skills; for peft alone."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="peft: one task as a LoRA. mttl, peft-mhr or peft-poly: skills and all routes.",
            autocompletion=_known("peft", "mttl", "peft-mhr", "peft-poly"),
        ),
    ] = "peft",
) -> output.Result:
    """Write one task as an ordinary PEFT LoRA, equal in function, or all for another program.

    Example: `polyroute export runs/mhr --task mnli --out out/mnli`
    """
    from polyroute.program.commands import export_run

    return export_run(run, task, out, format)


@_command()
def push(
    run: Annotated[Path, typer.Argument(help="Folder that `polyroute train` wrote.")],
    repository: Annotated[
        str, typer.Argument(help="On the hub, user/inventory; made if it is missing.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it is missing [main].")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Of the inventory, as the hub names it: apache-2.0.")
    ] = None,
) -> output.Result:
    """Send a run's inventory to the Hugging Face hub, with a model card written from the run.

    Log in with `hf auth login`, or set HF_TOKEN. A README.md in the run's folder is taken as the
    card.

    Example: `polyroute push runs/mhr user/inventory --private --license apache-2.0`
    """
    from polyroute.program.commands import push_run

    return push_run(
        run, repository, private=private, revision=revision, message=message, license=license
    )


@_command("import")
def import_(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Checkpoint of mttl (.ckpt), or folder of PEFT.")],
    model: Annotated[str, typer.Option(help="The base model that it was trained on, as in train.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="mttl, mttl-main, peft (a LoRA), peft-mhr or peft-poly [by what is there].",
            autocompletion=_known("mttl", "mttl-main", "peft", "peft-mhr", "peft-poly"),
        ),
    ] = None,
    tasks_file: Annotated[
        Path | None,
        typer.Option(help="Names of the routing rows: one a line, or a JSON list [numbers]."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read .ckpt, .pt and .bin; runs no code in them."),
    ] = False,
    dtype: Dtype = "float32",
    max_input: MaxInput = 256,
    max_target: MaxTarget = 64,
    overwrite: Overwrite = False,
    config: Config = None,
) -> output.Result:
    """Make a run of an inventory that another program trained; the other commands then take it.

    Example: `polyroute import mhr.ckpt --model google/t5-xl-lm-adapt --out runs/mhr --allow-pickle`
    """
    from polyroute.program.commands import import_run

    _positive(max_input=max_input, max_target=max_target)
    return import_run(context.params)


@_command()
def inspect(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(help="Suite: compares routes with the categories of its tasks."),
    ] = None,
    reader: Reader = None,
) -> output.Result:
    """Show what a run holds: sizes, tasks, and which skills they use.

    The base model is not needed.

    Example: `polyroute inspect runs/mhr --data SUITE`
    """
    from polyroute.program.commands import inspect_run

    return inspect_run(run, data, _reader(reader or []))


@_command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that train, adapt or demo wrote.")],
    out: Annotated[Path, typer.Option(help="The page; an older report is replaced.")] = Path(
        "report.html"
    ),
    data: Annotated[
        str | None, typer.Option(help="Suite with the categories of tasks [that of the runs].")
    ] = None,
    reader: Reader = None,
) -> output.Result:
    """Show what runs came to on one HTML page: tables, curves, alignment, and how tasks are routed.

    The page needs no network. Its figures (PNG, SVG) and numbers (CSV) go to a folder beside it. A
    run of train brings the adaptations and scores in its folder. Runs that differ by their seed
    alone are one line of the table.

    Example: `polyroute report runs/shared runs/poly runs/mhr --out report.html`
    """
    from polyroute.report_page import write_report

    beside = write_report(runs, out, data=data, reader=_reader(reader or []))
    return output.Result(
        {"out": out, "files": beside},
        (f"the report is {out}; its figures and numbers are in {beside}",),
    )


def _beside(run: Path) -> Path:
    """The folder of a run, if results can go into it."""
    from polyroute.saved.hub import Snapshot, locate

    if isinstance(locate(run), Snapshot):
        raise InputError(f"{run} is on the hub: say with --out where the results go")
    return run


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


def _reader(texts: Sequence[str]) -> dict[str, Any] | None:
    """`seed=1024` as the name of an option of a reader and its value."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--reader {text!r} must be an option and its value: seed=1024")
        value = value.strip()
        try:
            parsed = json.loads(value) if value.startswith(("{", "[")) else _value(value)
        except ValueError as error:
            raise InputError(f"--reader {text!r} has a value that is not JSON: {error}") from error
        found[name.strip().replace("-", "_")] = parsed
    return found or None  # so that runs from before there were readers' options can go on


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
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


def _not_negative(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise InputError(
                f"--{name.replace('_', '-')} must be finite and not negative, not {value:g}"
            )


def _check_optimizer(name: str, schedule: str, *, scale_parameter: bool, rowwise: bool) -> None:
    if name not in TRAINING_OPTIMIZERS:
        raise InputError(f"unknown optimizer {name!r} of training; use adamw or adafactor")
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}; use linear or constant")
    if name != "adafactor" and not scale_parameter:
        raise InputError("--no-scale-parameter is for adafactor; add --optimizer adafactor")
    if name != "adamw" and rowwise:
        raise InputError(f"--rowwise is an AdamW; leave it out with --optimizer {name}")


def _check_start(context: typer.Context, model: str | None, start: Path | None) -> None:
    if start is None:
        if model is None:
            raise InputError("name a base model with --model, or a run to go on from with --start")
        return
    path, configured = context.meta.get("polyroute.config", (None, ()))
    for name in FROM_START:  # what a recipe says of them is for fresh runs
        source = context.get_parameter_source(name)
        option = name.replace("_", "-")
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"--{option} comes from the run that --start names; leave it out")
        if name in configured:
            raise InputError(
                f"{option} in {path} comes from the run that --start names; leave it out"
            )


def _check_training(
    phase: str, warmup: float, cap: int | None, seed: int, *, is_fresh: bool
) -> None:
    allowed = TRAINING_PHASES if is_fresh else (*TRAINING_PHASES, *CONTINUED_PHASES)
    if phase not in allowed:
        more = "; others go on from a run, with --start" if is_fresh else ""
        raise InputError(f"unknown phase {phase!r} of training; use {' or '.join(allowed)}{more}")
    if not 0 <= warmup < 1:
        raise InputError(f"--warmup must be at least 0 and below 1, not {warmup:g}")
    if cap is not None:
        _positive(cap=cap)
    if not 0 <= seed < SEEDS:
        raise InputError(f"--seed must be from 0 to {SEEDS - 1}, not {seed}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. What ends it early is one sentence, and one of `EXIT_CODES`."""
    output.reset()
    arguments = sys.argv[1:] if arguments is None else arguments
    code, sentence = DONE, ""
    try:
        with terminable():
            code = app(args=arguments or ["--help"], standalone_mode=False) or DONE
    except USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "polyroute"
        reason = " ".join(error.format_message().split()).rstrip(".")
        code, sentence = REFUSED, f"error: {reason} (see `{command} --help`)"
    except InputError as error:
        code, sentence = REFUSED, f"error: {error}"
    except BrokenPipeError:  # whoever read what we print has gone
        sys.stdout = None
        code = FAILED
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        code, sentence = REFUSED, f"error: {name}{error.strerror or error}"
    except _Stopped as stop:
        code, sentence = stop.code, str(stop)
    except KeyboardInterrupt as stop:  # between commands
        stopped = _Stopped(stop)
        code, sentence = stopped.code, str(stopped)
    except Exception as error:
        if output.mode.verbose:
            traceback.print_exc()
        reason = " ".join(str(error).split()).rstrip(".")
        what = type(error).__name__ + (f" ({reason})" if reason else "")
        code, sentence = FAILED, f"failed: {what}; --verbose shows where"
    if sentence:
        print(f"polyroute: {sentence}", file=sys.stderr)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
