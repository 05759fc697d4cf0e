"""Running a preset: everything is checked first, and stages that are done are left out."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.data.suite import Suite, check_tasks, held_out_tasks, validate
from polyroute.errors import InputError, did_you_mean
from polyroute.host.files import write_json, write_text
from polyroute.host.interrupts import resumable
from polyroute.host.output import Result, mode
from polyroute.loading import check_base, load_suite
from polyroute.program.commands.folder import RunFolder
from polyroute.program.options.experiments import ReproduceOptions
from polyroute.program.reproduce.page import page_of
from polyroute.program.reproduce.preset import Preset, read_preset
from polyroute.program.reproduce.rehearsal import rehearse
from polyroute.program.reproduce.results import summarise
from polyroute.program.reproduce.stages import Plan, readers_of
from polyroute.program.stages import Prepare, Stage
from polyroute.saved.runs import held

__all__ = ["run_preset"]


def run_preset(options: ReproduceOptions, commands: Mapping[str, Prepare]) -> Result:
    """Run a preset, or what is left of it, and write `results.json` and `results.md`.

    Args:
        options: the options of `polyroute reproduce`.
        commands: by name, how `train`, `adapt` and `evaluate` are checked and run, and `BEGIN`.

    Returns:
        What `results.json` holds or, of a dry run, the stages.

    Raises:
        InputError: a name, the data, the base model or an option cannot be used; nothing ran. Or a
            stage failed.
    """
    name = options.preset
    given = _given(options)
    preset = read_preset(name, given)
    methods = list(dict.fromkeys(options.methods or preset.methods))
    for method in methods:
        _check_known(name, "method", method, preset.methods)
    _check_known(name, "selection", options.selection, preset.selection)
    folder = RunFolder("reproduce", options.out, options, (preset.model, preset.data))
    tasks = _checked_tasks(name, preset)
    check_base(preset.model, trust_remote_code=mode.trust_remote_code)
    plan = Plan(preset, folder.path, options.selection, tasks, given)
    planned = [plan.of(method) for method in methods]
    stages = [stage for method in planned for stage in method.stages]
    rehearse(stages, folder.path, commands)
    config = {
        "preset": name, "model": preset.model, "data": preset.data, "methods": methods,
        "selection": options.selection,
        "settings": {k: v for k, v in given.items() if k not in ("model", "data")},
        "quick": options.quick,
    }  # fmt: skip
    if options.dry_run:
        folder.compare(config, options.given)
        return _plan({"out": folder.path, **config}, stages, folder.path)
    place = folder.open(config, options.given)
    with held(place), resumable(place):
        for stage in stages:
            stage.run(commands)
            ways = [way for method in planned for way in method.ways]
            content = {**config, **summarise(preset, ways)}
            write_json(place / "results.json", content)
            write_text(place / "results.md", page_of(content, preset))
    return Result({"out": place, **content}, (f"the results are in {place / 'results.md'}",))


def _given(options: ReproduceOptions) -> dict[str, Any]:
    """What replaces values of the preset, by place."""
    given = dict(options.settings or {})
    named = {"model": options.model, "data": options.data}
    for place, value in named.items():
        if value is not None and given.get(place, value) != value:
            raise InputError(f"--{place} and --set {place} differ: give one of them")
        if value is not None:
            given[place] = value
    return {**read_preset(options.preset).quick, **given} if options.quick else given


def _check_known(preset: str, what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise InputError(f"the preset {preset} has no {what} {name!r}; {did_you_mean(name, known)}")


def _plan(config: Mapping[str, Any], stages: Sequence[Stage], folder: Path) -> Result:
    """The stages of a run, in order."""
    rows: list[dict[str, Any]] = [
        {
            "command": stage.command,
            "result": str(stage.result.relative_to(folder)),
            "is_done": stage.is_done,
            "options": dict(stage.options),
        }
        for stage in stages
    ]
    table = Table("stage", "phase", "steps", "shots", "seeds", "writes", "")
    for row in rows:
        given = row["options"]
        phase = "zero-shot" if given.get("zero_shot") else given.get("phase", "")
        cells = [phase, *(given.get(name, "") for name in ("steps", "shots", "seeds"))]
        cells = [str(cell) for cell in (row["command"], *cells, row["result"])]
        table.add_row(*map(escape, cells), "done" if row["is_done"] else "")
    left = sum(not row["is_done"] for row in rows)
    shown = (
        f"{config['preset']} with {config['model']} on {config['data']}, "
        f"selection {config['selection']}",
        table,
        f"{left} of {len(rows)} stages are to do in {folder}; empty cells are as the recipe says",
        "nothing was written",
    )
    return Result({**config, "stages": rows}, shown)


def _checked_tasks(name: str, preset: Preset) -> Sequence[str] | None:
    """The held-out tasks, once all of their data has been read; None for all the base can use."""
    if preset.data is None:
        raise InputError(f"the preset {name} needs --data: {preset.needs}")
    for options in readers_of(preset):
        try:
            suite = load_suite(preset.data, options)
            tasks = check_tasks(suite, preset.tasks or held_out_tasks(suite))
        except InputError as error:
            raise InputError(f"{error}; the preset {name} needs {preset.needs}") from error
        validate(suite, tasks, needs=["train", "test"])
        _check_score(preset, suite, tasks)
        if preset.least:
            tasks = _large_enough(preset, suite, tasks)
    return None if preset.tasks is None and not preset.least else tasks


def _large_enough(preset: Preset, suite: Suite, tasks: Sequence[str]) -> tuple[str, ...]:
    counts = {t: sum(len(suite.split(t, s)) for s in ("train", "test")) for t in tasks}
    able = tuple(task for task in tasks if counts[task] >= preset.least)
    if not able:
        raise InputError(
            f"no held-out task of {preset.data} has {preset.least} examples; "
            "lower it with --set least=0"
        )
    return able


def _check_score(preset: Preset, suite: Suite, tasks: Sequence[str]) -> None:
    for task in tasks:
        metric = suite.info(task).metric
        if preset.score == "score_normalised" and metric != "accuracy":
            raise InputError(
                f"the task {task!r} is scored by {metric}, which has no score_normalised: add "
                "--set score=score, or name the tasks with --set tasks=[...]"
            )
