"""The demo on a language model: SmolLM2 learns the starter suite, then new tasks from few examples.

Each stage is a polyroute command, printed before it runs, with a folder or file of its own. A stage
that is done is not done again, and the results are made from what lies in these folders.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from polyroute.data.open import STARTER, open_suite
from polyroute.data.suite import held_out_tasks
from polyroute.exchange.lora import from_lora
from polyroute.host.files import read_json, write_json, write_text
from polyroute.host.interrupts import resumable
from polyroute.host.output import Result, say
from polyroute.loading import check_base
from polyroute.program.commands.folder import RunFolder
from polyroute.program.commands.runs import base_of
from polyroute.program.options.experiments import DemoLmOptions
from polyroute.program.stages import Prepare, Stage
from polyroute.report_page import write_report
from polyroute.saved.markdown import table
from polyroute.saved.metrics import read_metrics
from polyroute.saved.runs import held, machine
from polyroute.settings import typed
from polyroute.study.base_alone import BaseAlone
from polyroute.study.examples import encoded
from polyroute.study.intervals import Estimate, estimates

__all__ = ["run_demo_lm", "table_of_contenders"]

MODEL = "smollm2"
READING: dict[str, Any] = {"dtype": "auto", "max_input": 160, "max_target": 32}
SHOTS = 16
SEED = 42
# The rates and steps were chosen on tasks that are neither trained on nor held out here, from three
# rates for each contender.
TRAIN: dict[str, Any] = {"rank": 4, "steps": 200, "batch_size": 16, "lr": 2e-3}
METHODS: dict[str, dict[str, Any]] = {
    "mhr": {"method": "mhr", "skills": 8, "heads": 8},
    "shared": {"method": "shared"},
}
ADAPT: dict[str, Any] = {"shots": SHOTS, "batch_size": 8, "steps": 24, "memory": "2GB"}
ANSWERS = 3
"""The first examples of this many held-out tasks are answered before and after."""


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    name: str
    """What it is called in results."""
    title: str
    method: str | None
    """The run that it starts from; None for the base model alone."""
    phase: str | None
    """The phase of adaptation; None where nothing is adapted."""
    rates: Mapping[str, float]


CONTENDERS = (
    Contender("base", "the base model as it is", None, None, {}),
    Contender("shared zero-shot", "one LoRA for all tasks, without an example", "shared", None, {}),
    Contender("zero-shot", "the average of the skills, without an example", "mhr", None, {}),
    Contender("fresh", "a fresh LoRA", "shared", "random", {"lr": 3e-3}),
    Contender("shared", "one LoRA for all tasks, tuned", "shared", "full", {"lr": 1e-3}),
    Contender("mu", "the average of the skills, tuned (mu)", "mhr", "mu", {"lr": 3e-3}),
    Contender("z", "routing alone (z)", "mhr", "z", {"route_lr": 1.0}),
)
COMPARED = (("mu", "fresh"), ("z", "fresh"), ("mu", "shared"), ("z", "shared"))
"""Ways whose difference is put in words."""


def run_demo_lm(options: DemoLmOptions, commands: Mapping[str, Prepare]) -> Result:
    """Train, adapt and compare, and write `results.json`, `results.md` and `report.html`.

    Args:
        options: the options of `polyroute demo-lm`.
        commands: by name, how `train`, `adapt` and `evaluate` are checked and run.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: SmolLM2 is not installed, or the folder cannot be used.
    """
    folder = RunFolder("demo-lm", options.out, options)
    check_base(MODEL)
    place = folder.open(options.given.recorded, options.given)
    held_out = held_out_tasks(open_suite(STARTER))
    tasks = held_out[:2] if options.quick else held_out
    with held(place), resumable(place):
        stages = _stages(place, tasks, quick=options.quick)
        for stage in stages.values():
            if not stage.is_done:
                say(f"\n$ {_typed(stage)}")
                stage.run(commands)
        runs, page = [place / method for method in METHODS], place / "report.html"
        say(f"\n$ {shlex.join(['polyroute', 'report', *map(str, runs), '--out', str(page)])}")
        write_report(runs, page)
        lora = place / "mhr" / "mu"
        answers = _answers(place / "mhr", lora, tasks)
        scores = {
            contender.name: _scores(read_json(stages[contender.name].result), tasks)
            for contender in CONTENDERS
        }
        content = {**_summary(stages, scores), "answers": answers, "machine": machine()}
        write_json(place / "results.json", content)
        write_text(place / "results.md", _page(content))
        return Result({"out": place, **content}, _shown(content, place, lora / tasks[0]))


# ------------------------------------------------------------------ stages


def _stages(folder: Path, tasks: Sequence[str], *, quick: bool) -> dict[str, Stage]:
    """The commands by name, in order: a training of each method, then each contender."""
    share = 10 if quick else 1
    adapting = {**ADAPT, "steps": ADAPT["steps"] // share, "seeds": [SEED]}
    training = {**TRAIN, "steps": TRAIN["steps"] // share}
    stages = {}
    for method, adapter in METHODS.items():
        given = {"model": MODEL, "data": STARTER, **READING, **adapter, **training}
        run = folder / method
        stages[f"train {method}"] = Stage("train", {**given, "out": str(run)}, run / "metrics.json")
    for contender in CONTENDERS:
        stages[contender.name] = _stage_of(contender, folder, tasks, adapting)
    return stages


def _stage_of(
    contender: Contender, folder: Path, tasks: Sequence[str], adapting: Mapping[str, Any]
) -> Stage:
    """The command that scores one contender on the held-out tasks."""
    common = {"data": STARTER, "tasks": list(tasks)}
    if contender.method is None:
        result = folder / f"{contender.name}.json"
        return Stage("evaluate", {"model": MODEL, **common, **READING, "out": str(result)}, result)
    run = folder / contender.method
    if contender.phase is None:
        result = run / "zero-shot.json"
        scored = {"run": str(run), **common, "zero_shot": True, "out": str(result)}
        return Stage("evaluate", scored, result)
    place = run / contender.phase
    given = {"run": str(run), **common, "phase": contender.phase, **adapting, **contender.rates}
    return Stage("adapt", {**given, "out": str(place)}, place / "results.json")


def _typed(stage: Stage) -> str:
    """The command as a user would type it."""
    words = ["polyroute", stage.command]
    for name, value in stage.options.items():
        values = value if isinstance(value, list) else [value]
        if name == "run":
            words += values
        elif value is True:
            words.append(typed(name))
        else:
            words += [typed(name), ",".join(map(str, values))]
    return shlex.join(words)


# ------------------------------------------------------------------ results


def _scores(content: Any, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """For each task the mean scores over seeds, from what `evaluate` or `adapt` wrote."""
    results = content["tasks"] if isinstance(content, dict) else content
    found = []
    for task in tasks:
        own = [r for r in results if r["task"] == task and r["score"] is not None]
        per_token = [
            r["score"] if r["score_normalised"] is None else r["score_normalised"] for r in own
        ]
        found.append(
            {
                "task": task,
                "metric": own[0]["metric"],
                "score": float(np.mean([r["score"] for r in own])),
                "per_token": float(np.mean(per_token)),
                "trained_parameters": own[0].get("trained_parameters", 0),
                "seconds": float(np.mean([r.get("seconds", 0.0) for r in own])),
            }
        )
    return found


def _summary(
    stages: Mapping[str, Stage], scores: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The table, the differences between contenders, and what training took."""
    contenders = []
    for contender in CONTENDERS:
        own = scores[contender.name]
        [mean] = estimates(np.array([[one["score"]] for one in own]))
        contenders.append(
            {
                "name": contender.name,
                "title": contender.title,
                **_interval(mean),
                "per_token": float(np.mean([one["per_token"] for one in own])),
                "trained_parameters": own[0]["trained_parameters"],
                "seconds": float(np.mean([one["seconds"] for one in own])),
                "tasks": list(own),
            }
        )
    differences = []
    for one, other in COMPARED:
        pairs = zip(scores[one], scores[other], strict=True)
        [mean] = estimates(np.array([[a["score"] - b["score"]] for a, b in pairs]))
        differences.append({"one": one, "other": other, **_interval(mean)})
    training = {
        method: {
            # A run that an older version resumed has no time.
            name: read_metrics(stages[f"train {method}"].result.parent).get(name)
            for name in ("train_runtime", "trained_parameters")
        }
        for method in METHODS
    }
    return {
        "shots": SHOTS,
        "training": training,
        "contenders": contenders,
        "differences": differences,
    }


def _interval(mean: Estimate) -> dict[str, float | None]:
    return {"score": mean.mean, "low": mean.low, "high": mean.high}


def _answers(run: Path, adapted: Path, tasks: Sequence[str]) -> list[dict[str, str]]:
    """What the model writes, before and after, for the first test example of some tasks."""
    base, kind = base_of(run)
    suite = open_suite(STARTER)
    found = []
    for task in tasks[:: max(1, len(tasks) // ANSWERS)][:ANSWERS]:
        example = suite.split(task, "test")[0]
        row = {**encoded(suite, task, "test", kind)[0], "task": task}
        [before] = kind.generate(BaseAlone(base), [row])
        model = from_lora(base, adapted / task / f"seed-{SEED}", tasks=[task])
        [after] = kind.generate(model, [row])
        base = model.unload()
        found.append(
            {
                "task": task,
                "prompt": f"{example['instruction']} {example['input']}".strip(),
                "target": example["target"],
                "before": before,
                "after": after,
            }
        )
    return found


# ------------------------------------------------------------------ pages


ANSWER = ("task", "target", "before", "after")
COLUMNS = (
    "contender", "score", "95 % interval over tasks", "score per token", "trained parameters",
    "seconds a task",
)  # fmt: skip


def _cells(contender: Mapping[str, Any]) -> list[str]:
    interval = (
        "" if contender["low"] is None else f"{contender['low']:.3f} to {contender['high']:.3f}"
    )
    return [
        contender["title"], f"{contender['score']:.3f}", interval, f"{contender['per_token']:.3f}",
        f"{contender['trained_parameters']:,}" if contender["trained_parameters"] else "",
        f"{contender['seconds']:.0f}" if contender["seconds"] else "",
    ]  # fmt: skip


def _words(content: Mapping[str, Any]) -> list[str]:
    """The findings as sentences, computed from the results."""
    titles = {contender["name"]: contender["title"] for contender in content["contenders"]}
    lines = []
    for each in content["differences"]:
        low, high = each["low"], each["high"]
        if low is None or low <= 0 <= high:
            verdict = "cannot be told apart from"
        else:
            verdict = "is better than" if low > 0 else "is worse than"
        interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        one, other = titles[each["one"]], titles[each["other"]]
        lines.append(f"{one} {verdict} {other}: {each['score']:+.3f}{interval}, paired by task")
    return [line[0].upper() + line[1:] for line in lines]


def _training(content: Mapping[str, Any]) -> str:
    return "Multi-task training: " + ", ".join(
        f"{method} {each['trained_parameters']:,} parameters"
        + ("" if each["train_runtime"] is None else f" in {each['train_runtime']:.0f} s")
        for method, each in content["training"].items()
    )


def table_of_contenders(content: Mapping[str, Any]) -> str:
    """The table of all contenders in Markdown, from what `results.json` holds."""
    return table(COLUMNS, [_cells(contender) for contender in content["contenders"]])


def _page(content: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    contenders = content["contenders"]
    by_task = [
        [same[0]["task"], same[0]["metric"], *(f"{one['score']:.3f}" for one in same)]
        for same in zip(*(contender["tasks"] for contender in contenders), strict=True)
    ]
    lines = [
        "# polyroute demo-lm",
        "",
        f"{_training(content)}. Then {len(by_task)} held-out tasks, of which every contender that "
        f"trains gets {content['shots']} examples each.",
        "",
        table_of_contenders(content),
        "",
        *(f"- {line}." for line in _words(content)),
        "",
        table(["task", "metric", *(contender["title"] for contender in contenders)], by_task),
        "",
        "Answers to the first test example of a task, before and after phase mu:",
        "",
    ]
    for each in content["answers"]:
        lines += [f"**{each['task']}** (right: {each['target']})", ""]
        lines += [*_quoted(each["prompt"]), "", f"before: {_line(each['before'])}", ""]
        lines += [f"after: {_line(each['after'])}", ""]
    return "\n".join(lines)


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()]


def _line(text: str) -> str:
    return " ".join(text.split())


def _shown(content: Mapping[str, Any], folder: Path, lora: Path) -> tuple[Any, ...]:
    """The results for the terminal."""
    scores = Table(*COLUMNS)
    for contender in content["contenders"]:
        scores.add_row(*_cells(contender))
    answers = Table(*ANSWER)
    for each in content["answers"]:
        answers.add_row(*(escape(_line(each[name])) for name in ANSWER))
    return (
        _training(content),
        scores,
        *(f"- {line}" for line in _words(content)),
        answers,
        f"the report is {folder / 'report.html'}, the tables are in {folder / 'results.md'}",
        f"each adapted task is an ordinary PEFT LoRA, such as {lora}",
    )
