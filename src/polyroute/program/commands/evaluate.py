"""`polyroute evaluate`: what a run scores on tasks of a suite."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.data.suite import Suite, validate
from polyroute.errors import InputError
from polyroute.host.files import check_place, make_folder, read_json, write_json
from polyroute.host.output import Result
from polyroute.kinds.choose import ModelKind
from polyroute.library.token_routes import token_route
from polyroute.loading import load_suite
from polyroute.model import RoutedModel
from polyroute.program.commands.adapted import number
from polyroute.program.commands.lengths import Measured, settled_lengths
from polyroute.program.commands.opened import opened
from polyroute.program.commands.runs import (
    BaseModel,
    beside,
    load,
    settled,
)
from polyroute.program.commands.tasks import chosen_tasks
from polyroute.program.options.finished import EvaluateOptions
from polyroute.routes.rule import RouteRule
from polyroute.study.base_alone import BaseAlone
from polyroute.study.evaluate import TaskScore, evaluate, macro_average

__all__ = ["evaluate_run"]


def evaluate_run(options: EvaluateOptions) -> Result:
    """Score a run, or a base model alone, and write the scores.

    Raises:
        InputError: the run, the base model, the data or a name cannot be used.
    """
    path = _place_of(options)
    _check_place(path)
    read, scores = _scores_of_base(options) if options.run is None else _scores_of_run(options)
    make_folder(path.parent)
    content = {
        "run": None if options.run is None else str(options.run),
        "model": options.model,
        "data": options.source.data,
        "split": options.split,
        "zero_shot": options.zero_shot,
        "route": options.route,
        "top_k": options.top_k,
        "max_test": options.max_test,
        **read,
        "macro_average": macro_average(scores),
        "tasks": [score.to_dict() for score in scores],
    }
    write_json(path, content)
    return Result({"out": path, **content}, (_table_of(scores), f"scores are in {path}"))


def _place_of(options: EvaluateOptions) -> Path:
    """The file of the scores."""
    if options.run is None or options.out is not None:
        assert options.out is not None
        return options.out
    way = "zero-shot-" if options.zero_shot else f"{options.route}-" if options.route else ""
    name = f"evaluate-{way}{options.split}.json"
    return beside(options.run) / name


def _reading(base: Any, kind: ModelKind) -> dict[str, Any]:
    """How a base model was loaded and read."""
    return {
        "dtype": str(base.dtype).removeprefix("torch."),
        "prompt": kind.prompting.way,
        "system": kind.prompting.system,
        "max_input": kind.max_input,
        "max_target": kind.max_target,
    }


def _scores_of_run(options: EvaluateOptions) -> tuple[dict[str, Any], list[TaskScore]]:
    assert options.run is not None
    given = opened(
        options.run, options.source, needs=[options.split], limits=options.reading,
        are_learned=not options.zero_shot and options.route is None,
    )  # fmt: skip
    route: str | RouteRule | None = "mu" if options.zero_shot else None
    if options.route is not None:
        route = token_route(options.route, options.top_k)
    with given.attached() as model:
        for task in given.tasks:
            if route is None and task not in model.routes:
                raise InputError(
                    f"task {task!r} has no route in {given.run}: add --zero-shot to route it as "
                    "the average of the skills or --route to let each token choose, or adapt to "
                    "it with `polyroute adapt`"
                )
        model.eval()
        scores = _scores(options, model, given.kind, given.suite, given.tasks, route)
    return _reading(given.base, given.kind), scores


def _scores_of_base(options: EvaluateOptions) -> tuple[dict[str, Any], list[TaskScore]]:
    assert options.model is not None
    suite = load_suite(options.source.data, options.source.reader)
    reading, _ = settled(options.reading, options.given)
    base, kind = load(BaseModel(options.model, reading))
    tasks = chosen_tasks(
        suite, options.source.tasks, suite.tasks, kind, none=f"{options.source.data} has no task"
    )
    validate(suite, tasks, needs=[options.split])
    kind, *_ = settled_lengths(
        base, kind, reading, options.given, Measured(suite, tasks, options.split)
    )
    scores = _scores(options, BaseAlone(base), kind, suite, tasks, None)
    return _reading(base, kind), scores


def _scores(
    options: EvaluateOptions,
    model: RoutedModel | BaseAlone,
    kind: ModelKind,
    suite: Suite,
    tasks: Sequence[str],
    route: str | RouteRule | None,
) -> list[TaskScore]:
    return evaluate(
        model, kind, suite, tasks, route=route, split=options.split,
        batch_size=options.batch_size, max_examples=options.max_test,
    )  # fmt: skip


def _check_place(path: Path) -> None:
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
            escape(s.task), s.metric, f"{s.score:.3f}", number(s.score_normalised),
            number(s.majority), number(s.chance), str(s.num_examples),
        )  # fmt: skip
    average = macro_average(scores)
    table.add_row(
        "mean over tasks", "", number(average["score"]), "", number(average["majority"]),
        number(average["chance"]), "",
    )  # fmt: skip
    return table
