"""The experiments of the paper from beginning to end, as presets that lie in the folder `presets`.

A preset says what is trained and adapted on what; each of its stages is a polyroute command with a
folder of its own, so a stage that is done is not done again, and the results are always made from
what lies in these folders.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from rich.markup import escape
from rich.table import Table

from polyroute.data.suite import Suite, check_tasks, held_out_tasks, validate
from polyroute.errors import InputError, did_you_mean
from polyroute.host.files import read_json, write_json, write_text
from polyroute.host.interrupts import resumable
from polyroute.host.output import Result
from polyroute.host.yaml_files import read_yaml
from polyroute.loading import check_base, load_suite
from polyroute.model import Phase
from polyroute.program.recipes import SECTIONS, shipped
from polyroute.saved.runs import RUNNING, check_run, held, open_run, record

__all__ = ["Command", "Preset", "aggregate", "preset_names", "read_preset", "reproduce"]

Command = Callable[[str, Mapping[str, Any]], Callable[[], None]]
"""Takes the name of a command and its options and checks them; what it returns runs it."""

SCORES = ("score", "score_normalised")
SEEDS_OF = ("draw", "reader")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One experiment, as a file in the folder `presets` says it."""

    about: str
    needs: str
    """What to download, and where it must lie."""
    model: str
    models: Mapping[str, Mapping[str, Any]]
    """Options of training that depend on the base model."""
    data: str | None
    """The suite; None where it has to be given."""
    reader: Mapping[str, Any]
    """Options of the suite's reader; MODEL stands for the base model."""
    recipe: str
    train: Mapping[str, Any]
    """Options of training besides those of the recipe, for every method and model."""
    adapt: Mapping[str, Any]
    """Options of adaptation besides those of the recipe, for every method and phase."""
    methods: Mapping[str, Mapping[str, Any]]
    """By name: `title`, options of `train`, and the `phases` of adaptation."""
    zero_shot: bool
    """Whether to score the average of the skills as it is."""
    mu_training: Mapping[str, Any]
    """Options with which the average is trained further on the training tasks, for methods with a
    phase mu, before it is scored so once more; none where this is empty."""
    tasks: Sequence[str] | None
    """The held-out tasks; None for all of the suite."""
    least: int
    """Examples that a held-out task must have."""
    shots: int | Mapping[str, int]
    """Training examples, of every task or of each."""
    seeds: Sequence[int]
    seeds_of: str
    """What a seed chooses: `draw`, the examples drawn from the training split; or `reader`, what
    the reader of the suite puts there."""
    score: str
    """Which score of a result counts."""
    selection: Mapping[str, Mapping[str, Any]]
    """By name: options of `adapt` that choose the best step, each a value or one for each number of
    shots; and what that `says`."""
    says: Sequence[str]
    """Where it differs from the published runs."""
    quick: Mapping[str, Any]
    """What `--quick` sets."""
    reference: Mapping[str, Any] | None
    """Published numbers: their `source`, `columns`, and `rows` by method and phase."""

    def __post_init__(self) -> None:
        """Check what the run relies on."""
        self._check_kinds()
        for name in self.methods:
            if self.methods[name].keys() != {"title", "train", "phases"}:
                raise InputError(f"the method {name!r} must have a title, train and phases")
            phases = self.methods[name]["phases"]
            if not isinstance(phases, list) or not set(phases) <= set(get_args(Phase)):
                raise InputError(
                    f"the phases of the method {name!r} must be a list of some of "
                    f"{', '.join(get_args(Phase))}, not {phases!r}"
                )
        for name in self.selection:
            if self.selection[name].keys() != {"adapt", "says"}:
                raise InputError(f"the selection {name!r} must have adapt and says")
        seeds = self.seeds
        if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
            raise InputError(f"seeds must be a list of whole numbers such as [42, 0], not {seeds}")
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
            raise InputError(f"seeds must be different numbers from 0 to {2**32 - 1}, not {seeds}")
        if self.tasks is not None and not (
            isinstance(self.tasks, list) and all(isinstance(task, str) for task in self.tasks)
        ):
            raise InputError(f"tasks must be a list such as [rte, cb], not {self.tasks!r}")
        if not isinstance(self.shots, int | dict):
            raise InputError(f"shots must be a number, or one for each task, not {self.shots!r}")
        for task in self.tasks or ():
            if isinstance(self.shots, dict) and task not in self.shots:
                raise InputError(f"shots has no number for the task {task!r}; add shots.{task}")

    def _check_kinds(self) -> None:
        mappings = ("models", "reader", "train", "adapt", "methods", "mu_training", "selection")
        for name in mappings:
            content = getattr(self, name)
            nested = name in ("models", "methods", "selection")
            if not isinstance(content, dict) or (
                nested and not all(isinstance(entry, dict) for entry in content.values())
            ):
                raise InputError(f"{_key(name)} must map names to values, not be {content!r}")
        for name in ("model", "recipe"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a name, not {getattr(self, name)!r}")
        if not isinstance(self.says, list):
            raise InputError(f"says must be a list of sentences, not {self.says!r}")
        if not isinstance(self.reference, dict | None):
            raise InputError(
                f"reference must have source, columns and rows, not {self.reference!r}"
            )
        if not isinstance(self.data, str | None):
            raise InputError(f"data must be a suite, not {self.data!r}")
        if type(self.least) is not int or self.least < 0:
            raise InputError(f"least must be a whole number, 0 or more, not {self.least!r}")
        if not isinstance(self.zero_shot, bool):
            raise InputError(f"zero-shot must be true or false, not {self.zero_shot!r}")
        for name, known in (("score", SCORES), ("seeds_of", SEEDS_OF)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{_key(name)} must be {' or '.join(known)}, not {value!r}")


@dataclass(frozen=True)
class Stage:
    """One command, and the file that it writes last."""

    command: str
    options: Mapping[str, Any]
    result: Path

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.is_file() and not (self.result.parent / RUNNING).exists()


@dataclass(frozen=True)
class Way:
    """One line of the results: a method in a phase, with the files its scores are in."""

    method: str
    phase: str
    stages: Sequence[Stage]


def _key(name: str) -> str:
    """What a preset calls one of its fields."""
    return name.replace("_", "-")


def preset_names() -> tuple[str, ...]:
    """The presets there are."""
    return shipped("presets")


def read_preset(name: str, settings: Mapping[str, Any] | None = None) -> Preset:
    """A preset by its name, with some of its values replaced.

    Args:
        name: of the preset.
        settings: values by place, such as `shots` or `methods.mhr.train.heads`. What begins with
            `train.` or `adapt.` may be any option of that command.

    Raises:
        InputError: there is no such preset, or no such place in it.
    """
    if name not in preset_names():
        raise InputError(f"there is no preset {name!r}; {did_you_mean(name, preset_names())}")
    content = read_yaml(
        files("polyroute.program") / "presets" / f"{name}.yaml", f"the preset {name}"
    )
    known = {_key(field.name) for field in fields(Preset)}
    for place, value in (settings or {}).items():
        *path, last = place.split(".")
        where: Any = content
        for part in path:
            where = where.get(part) if isinstance(where, dict) else None
        if not isinstance(where, dict) or (last not in where and not path):
            raise InputError(
                f"the preset {name} has no {place!r} to set; {did_you_mean(place, known)}, and "
                "options of training and adaptation as train.OPTION and adapt.OPTION"
            )
        where[last] = value
    if content.keys() != known:
        wrong = sorted(content.keys() ^ known)
        raise InputError(f"the preset {name} must have exactly its known keys, see {wrong}")
    return Preset(**{key.replace("-", "_"): value for key, value in content.items()})


def reproduce(
    name: str,
    out: Path,
    command: Command,
    *,
    model: str | None = None,
    data: str | None = None,
    methods: Sequence[str] | None = None,
    selection: str = "separate",
    settings: Mapping[str, Any] | None = None,
    quick: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Result:
    """Run a preset, or what is left of it, and write `results.json` and `results.md`.

    Args:
        name: of the preset.
        out: the folder of the run; each method has a folder in it.
        command: checks and runs a command of polyroute.
        model: the base model, instead of the preset's.
        data: the suite, instead of the preset's.
        methods: which of the preset's; None for all.
        selection: how the best step of an adaptation is chosen; one of the preset's.
        settings: see `read_preset`.
        quick: a tenth of the work and one seed, to see that it runs.
        resume: go on with the run that is there.
        overwrite: replace it.
        dry_run: check everything, and write and run nothing.

    Returns:
        What `results.json` holds or, of a dry run, the stages.

    Raises:
        InputError: a name, the data, the base model or an option cannot be used; nothing ran. Or a
            stage failed.
    """
    given = dict(settings or {})
    given |= {key: value for key, value in (("model", model), ("data", data)) if value is not None}
    if quick:
        given = {**read_preset(name).quick, **given}
    preset = read_preset(name, given)
    for chosen in methods or ():
        if chosen not in preset.methods:
            known = did_you_mean(chosen, preset.methods)
            raise InputError(f"the preset {name} has no method {chosen!r}; {known}")
    if selection not in preset.selection:
        known = did_you_mean(selection, preset.selection)
        raise InputError(f"the preset {name} has no selection {selection!r}; {known}")
    place: dict[str, Any] = {
        "resume": resume,
        "overwrite": overwrite,
        "inputs": [text for text in (preset.model, preset.data) if text],
    }
    folder = check_run(out, "reproduce", **place)
    tasks = _checked_tasks(name, preset)
    check_base(preset.model)
    plan = [
        (train, ways)
        for method in dict.fromkeys(methods or preset.methods)
        for train, ways in [_planned(preset, method, folder, selection, tasks, given)]
    ]
    stages = [
        stage for train, ways in plan for stage in (train, *(s for way in ways for s in way.stages))
    ]
    for stage in stages:
        command(stage.command, stage.options)
    config = {
        "preset": name, "model": preset.model, "data": preset.data,
        "methods": [train.result.parent.name for train, _ in plan], "selection": selection,
        "settings": {k: v for k, v in given.items() if k not in ("model", "data")}, "quick": quick,
    }  # fmt: skip
    if dry_run:
        if resume:
            record(folder, "reproduce", config, resume=True)  # which compares, and writes nothing
        return _plan({"out": folder, **config}, stages, folder)
    open_run(folder, "reproduce", **place)
    record(folder, "reproduce", config, resume=resume)
    with held(folder), resumable(folder):
        for stage in stages:
            _run(stage, command)
            summary = _summary(preset, [way for _, ways in plan for way in ways])
            write_json(folder / "results.json", {**config, **summary})
            write_text(folder / "results.md", _page({**config, **summary}, preset))
    return Result(
        {"out": folder, **config, **summary}, (f"the results are in {folder / 'results.md'}",)
    )


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
        f"{left} of {len(rows)} stages are to do in {folder}; what is empty is as the recipe says",
        "nothing was written",
    )
    return Result({**config, "stages": rows}, shown)


def _checked_tasks(name: str, preset: Preset) -> Sequence[str] | None:
    """The held-out tasks, once all of their data has been read; None for all the base can use."""
    if preset.data is None:
        raise InputError(f"the preset {name} needs --data: {preset.needs}")
    for options in _readers(preset):
        try:
            suite = load_suite(preset.data, options)
            tasks = check_tasks(suite, preset.tasks or held_out_tasks(suite))
        except InputError as error:
            raise InputError(f"{error}; the preset {name} needs {preset.needs}") from error
        validate(suite, tasks, needs=["train", "test"])
        _check_score(preset, suite, tasks)
        if preset.least:
            counts = {t: sum(len(suite.split(t, s)) for s in ("train", "test")) for t in tasks}
            tasks = tuple(task for task in tasks if counts[task] >= preset.least)
            if not tasks:
                raise InputError(
                    f"no held-out task of {preset.data} has {preset.least} examples; "
                    "lower it with --set least=0"
                )
    return None if preset.tasks is None and not preset.least else tasks


def _check_score(preset: Preset, suite: Suite, tasks: Sequence[str]) -> None:
    for task in tasks:
        metric = suite.info(task).metric
        if preset.score == "score_normalised" and metric != "accuracy":
            raise InputError(
                f"the task {task!r} is scored by {metric}, which has no score_normalised: add "
                "--set score=score, or name the tasks with --set tasks=[...]"
            )


def _readers(preset: Preset) -> list[dict[str, Any]]:
    """The options of the suite's reader for each group of seeds that is adapted at once."""
    common = {k: preset.model if v == "MODEL" else v for k, v in preset.reader.items()}
    if preset.seeds_of == "draw":
        return [common]
    return [{**common, "seed": seed} for seed in preset.seeds]


def _planned(
    preset: Preset,
    method: str,
    folder: Path,
    selection: str,
    tasks: Sequence[str] | None,
    given: Mapping[str, Any],
) -> tuple[Stage, list[Way]]:
    """The stages of a method: training, and what is then scored."""
    # What was set by hand wins over what the preset says of a method or model.
    by_hand = {
        section: _options({k.partition(".")[2]: v for k, v in given.items() if _in(section, k)})
        for section in SECTIONS
    }
    run = folder / method
    common = {"data": preset.data}
    readers = [
        [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items()]
        for options in _readers(preset)
    ]
    train = {
        "recipe": preset.recipe,
        "model": preset.model,
        **common,
        "reader": readers[0],
        **_options(preset.models.get(preset.model, {})),
        **_options(preset.train),
        **_options(preset.methods[method]["train"]),
        **by_hand["train"],
        "out": str(run),
    }
    ways = []
    if preset.zero_shot:
        result = run / "zero-shot.json"
        options: dict[str, Any] = {
            "run": str(run), **common, "reader": readers[0], "zero_shot": True,
            "tasks": None if tasks is None else list(tasks), "out": str(result),
        }  # fmt: skip
        ways.append(Way(method, "zero-shot", [Stage("evaluate", options, result)]))
        if preset.mu_training and "mu" in preset.methods[method]["phases"]:
            place = folder / f"{method}-mu"
            further = {
                **train, "start": str(run), "phase": "mu", **_options(preset.mu_training),
                "out": str(place),
            }  # fmt: skip
            result = place / "zero-shot.json"
            scoring = {**options, "run": str(place), "out": str(result)}
            stages = [
                Stage("train", further, place / "metrics.json"),
                Stage("evaluate", scoring, result),
            ]
            ways.append(Way(method, "zero-shot, mu trained further", stages))
    is_drawn = preset.seeds_of == "draw"
    for phase in preset.methods[method]["phases"]:
        stages = []
        for number, reader in enumerate(readers):
            seeds = list(preset.seeds) if is_drawn else [preset.seeds[number]]
            for shots, group in _by_shots(preset, tasks).items():
                place = run / "-".join([phase, str(shots), *([] if is_drawn else map(str, seeds))])
                options = {
                    "recipe": preset.recipe,
                    "run": str(run),
                    **common,
                    "reader": reader,
                    "phase": phase,
                    "tasks": group,
                    "shots": shots,
                    **_options(preset.adapt),
                    **_for_shots(preset.selection[selection]["adapt"], shots),
                    **by_hand["adapt"],
                    "seeds": seeds,
                    "out": str(place),
                }
                stages.append(Stage("adapt", options, place / "results.json"))
        ways.append(Way(method, phase, stages))
    return Stage("train", train, run / "metrics.json"), ways


def _in(section: str, place: str) -> bool:
    return place.startswith(f"{section}.")


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of their parameters, so that one layer replaces another."""
    return {name.replace("-", "_"): value for name, value in options.items()}


def _for_shots(options: Mapping[str, Any], shots: int) -> dict[str, Any]:
    """The options where some have a value for each number of shots."""
    found = _options(options)
    for name, value in found.items():
        if isinstance(value, dict):
            if shots not in value:
                raise InputError(
                    f"the preset has no {name} for {shots} shots; set it: --set adapt.{name}=..."
                )
            found[name] = value[shots]
    return found


def _by_shots(preset: Preset, tasks: Sequence[str] | None) -> dict[int, list[str] | None]:
    """The tasks that get each number of shots; they are adapted side by side."""
    if isinstance(preset.shots, int):
        return {preset.shots: None if tasks is None else list(tasks)}
    if tasks is None:
        raise InputError("shots names tasks, so tasks must too: add --set tasks=[...]")
    found: dict[int, list[str] | None] = {}
    for task in tasks:
        found[preset.shots[task]] = [*(found.get(preset.shots[task]) or []), task]
    return found


def _run(stage: Stage, command: Command) -> None:
    """Run a stage, or what is left of it."""
    if stage.is_done:
        return
    options = dict(stage.options)
    if stage.command != "evaluate":
        options["resume"] = (Path(options["out"]) / "run.json").is_file()
    command(stage.command, options)()


def aggregate(results: Sequence[Mapping[str, Any]], score: str = "score") -> dict[str, Any]:
    """The published aggregate: the median over seeds of each task, then the mean over tasks.

    Two things are called standard deviation in publications: `std_over_tasks` is that of the
    medians, which says how unlike the tasks are; `mean_std_over_seeds` is the mean over tasks of
    that of the seeds, which says how much a score depends on luck. Both are of samples (n - 1), and
    None where there is one value.

    Args:
        results: with `task`, `seed` and the score; None for what diverged, which is left out and
            counted.
        score: the name of the score.

    Raises:
        InputError: no result has the score.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(result["task"] for result in results):
        own = {r["seed"]: r[score] for r in results if r["task"] == task and r[score] is not None}
        if own:
            tasks[task] = {
                "median": statistics.median(own.values()),
                "std_over_seeds": _std(list(own.values())),
                "scores": {str(seed): value for seed, value in own.items()},
            }
    if not tasks:
        raise InputError(f"no result has a {score!r}; the tasks may need another, see --set score=")
    medians = [entry["median"] for entry in tasks.values()]
    stds = [entry["std_over_seeds"] for entry in tasks.values()]
    known = [std for std in stds if std is not None]
    return {
        "score": statistics.fmean(medians),
        "std_over_tasks": _std(medians),
        "mean_std_over_seeds": statistics.fmean(known) if known else None,
        "diverged": sum(result[score] is None for result in results),
        "tasks": tasks,
    }


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _summary(preset: Preset, ways: Sequence[Way]) -> dict[str, Any]:
    """All results there are so far, and what is to be known of them."""
    found = []
    rows = (preset.reference or {}).get("rows", {})
    for way in ways:
        done = [stage for stage in way.stages if stage.is_done]
        if len(done) < len(way.stages):
            continue
        results = [
            {"seed": None, **result, "score": result[preset.score]}
            for stage in done
            if stage.command != "train"
            for content in [read_json(stage.result)]
            for result in (content["tasks"] if stage.command == "evaluate" else content)
        ]
        found.append(
            {
                "method": way.method,
                "phase": way.phase,
                "trained_parameters": max(r.get("trained_parameters", 0) for r in results),
                "published": rows.get(f"{way.method} {way.phase}"),
                **aggregate(results),
            }
        )
    return {
        "aggregation": "median over seeds, then mean over tasks",
        "published_source": (preset.reference or {}).get("source"),
        "results": found,
    }


def _page(content: Mapping[str, Any], preset: Preset) -> str:
    """The results as Markdown."""
    columns = (preset.reference or {}).get("columns", [])
    choice = content["selection"]
    tuned = ", ".join(f"{key}={value}" for key, value in content["settings"].items())
    lines = [
        f"# {content['preset']}: {preset.about}",
        "",
        f"Base model: {content['model']}. Data: {content['data']}. Selection: **{choice}**. "
        f"{preset.selection[choice]['says']}",
        *([f"Set by hand: {tuned}."] if tuned else []),
        "",
        "Scores in percent: the median over seeds of each task, then the mean over tasks.",
        "",
        _line(
            "method", "phase", "score", "std over tasks (of the medians)",
            "std over seeds (mean of the tasks)", "trained parameters", "diverged",
            *(f"published: {column}" for column in columns),
        ),
        _line(*["---"] * (7 + len(columns))),
    ]  # fmt: skip
    for way in content["results"]:
        published = way["published"] or [None] * len(columns)
        lines.append(
            _line(
                preset.methods[way["method"]]["title"], way["phase"],
                *map(_percent, (way["score"], way["std_over_tasks"], way["mean_std_over_seeds"])),
                f"{way['trained_parameters']:,}", str(way["diverged"] or ""),
                *("" if number is None else f"{number:.1f}" for number in published),
            )
        )  # fmt: skip
    if content["published_source"]:
        lines += ["", f"Published numbers: {content['published_source']}."]
    lines += ["", "How this differs from the published runs:", ""]
    lines += [f"- {sentence}" for sentence in preset.says]
    tasks = list(dict.fromkeys(task for way in content["results"] for task in way["tasks"]))
    names = [f"{preset.methods[w['method']]['title']}, {w['phase']}" for w in content["results"]]
    lines += ["", "## Median over seeds, by task", "", _line("task", *names)]
    lines.append(_line(*["---"] * (1 + len(names))))
    for task in tasks:
        entries = [way["tasks"].get(task) for way in content["results"]]
        lines.append(_line(task, *("" if e is None else _percent(e["median"]) for e in entries)))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
