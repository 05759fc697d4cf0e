"""`polyroute compare`: does a library of LoRAs help with some tasks?"""

from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.host.files import check_place, make_folder, write_json
from polyroute.host.output import Result
from polyroute.judging import BASE, FRESH, ORACLE, RANDOM, Judgement, judge
from polyroute.program.commands.opened import opened
from polyroute.program.commands.runs import beside
from polyroute.program.options.library import CompareOptions
from polyroute.study.intervals import Estimate

__all__ = ["compare_library"]


def compare_library(options: CompareOptions) -> Result:
    """Judge the library of a run, and write what was found.

    Raises:
        InputError: the run has no library, or the data, a task or an option cannot be used.
    """
    path = options.out or beside(options.run) / "compare.json"
    check_place(path.parent)
    given = opened(options.run, options.source, needs=["train", options.split])
    with given.attached() as model:
        found = judge(
            model.eval(), given.kind, given.suite, given.tasks, options.settings,
            seeds=options.seeds, split=options.split, max_examples=options.max_test,
        )  # fmt: skip
    content = {
        "run": str(options.run),
        "data": options.source.data,
        "tasks": given.tasks,
        "split": options.split,
        "seeds": list(options.seeds),
        "settings": vars(options.settings),
        **_document(found),
    }
    make_folder(path.parent)
    write_json(path, content)
    return Result(
        {"out": path, **content},
        (_table(found), found.verdict, f"details are in {path}"),
    )


def _document(found: Judgement) -> dict[str, Any]:
    return {
        "unit": found.unit,
        "helps": bool(found.helping),
        "helping": found.helping,
        "verdict": found.verdict,
        "chosen": {task: list(names) for task, names in found.chosen.items()},
        "contenders": [
            {
                "name": name,
                **_numbers(found.estimate(name)),
                "minus_base": _numbers(found.estimate(name, BASE)),
                "minus_fresh": _numbers(found.estimate(name, FRESH)),
            }
            for name in found.scores
        ],
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {"score": estimate.mean, "low": estimate.low, "high": estimate.high}


def _table(found: Judgement) -> Table:
    table = Table("contender", "score", "minus base", "minus fresh LoRA", "minus best random")
    for name in (BASE, FRESH, *found.uses, ORACLE):
        if name not in found.scores:
            continue
        randoms = [own for own in found.controls_of(name) if own.startswith(RANDOM)]
        best = max(randoms, key=lambda own: float(found.scores[own].mean()), default=None)
        others = [None if name == control else control for control in (BASE, FRESH)] + [best]
        gaps = ["" if o is None else _signed(found.estimate(name, o)) for o in others]
        table.add_row(escape(name), _shown(found.estimate(name)), *gaps)
    return table


def _shown(own: Estimate) -> str:
    return f"{own.mean:.3f}" + ("" if own.low is None else f" [{own.low:.3f}, {own.high:.3f}]")


def _signed(own: Estimate) -> str:
    return f"{own.mean:+.3f}" + ("" if own.low is None else f" [{own.low:+.3f}, {own.high:+.3f}]")
