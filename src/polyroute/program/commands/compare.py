"""`polyroute compare`: does a library of LoRAs help with some tasks?"""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from polyroute.build import loaded
from polyroute.data.suite import held_out_tasks, validate
from polyroute.host.files import check_place, make_folder, write_json
from polyroute.host.output import Result
from polyroute.judge import BASE, FRESH, ORACLE, RANDOM, Judgement, judge
from polyroute.loading import load_suite
from polyroute.program.commands.runs import base_of, beside, inventory_of
from polyroute.program.commands.tasks import chosen_tasks
from polyroute.program.options.library import CompareOptions
from polyroute.saved.hub import locate
from polyroute.study.intervals import Estimate

__all__ = ["compare_library"]


def compare_library(options: CompareOptions) -> Result:
    """Judge the library of a run, and write what was found.

    Raises:
        InputError: the run has no library, or the data, a task or an option cannot be used.
    """
    path = options.out or beside(options.run) / "compare.json"
    check_place(path.parent)
    run = Path(locate(options.run))
    checkpoint = inventory_of(run)
    suite = load_suite(options.source.data, options.source.reader)
    base, kind = base_of(run)
    tasks = chosen_tasks(
        suite, options.source.tasks, held_out_tasks(suite), kind,
        none=f"{options.source.data} has no held-out task",
    )  # fmt: skip
    validate(suite, tasks, needs=["train", options.split])
    with loaded(base, checkpoint, run) as model:
        found = judge(
            model.eval(), kind, suite, tasks, options.settings, seeds=options.seeds,
            split=options.split, max_examples=options.max_test,
        )  # fmt: skip
    content = {
        "run": str(options.run),
        "data": options.source.data,
        "tasks": tasks,
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
