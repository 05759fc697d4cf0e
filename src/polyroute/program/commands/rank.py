"""`polyroute rank`: which LoRAs of a library would help with a task."""

from rich.markup import escape
from rich.table import Table

from polyroute.data.sampling import draw_few_shot
from polyroute.host.output import Result
from polyroute.host.progress import progress
from polyroute.library.ranking import rank_skills
from polyroute.program.commands.opened import opened
from polyroute.program.options.library import RankOptions
from polyroute.study.examples import encoded

__all__ = ["rank_library"]


def rank_library(options: RankOptions) -> Result:
    """Rank the LoRAs of a run for each of some tasks.

    Raises:
        InputError: the run has no library, or the data or a task cannot be used.
    """
    given = opened(options.run, options.source, needs=["train"])
    kind, suite, tasks = given.kind, given.suite, given.tasks
    found: dict[str, dict[str, float]] = {}
    table = Table("task", "LoRA", "decrease of the loss")
    with given.attached() as model:
        for task in progress(tasks, "ranking"):
            rows = encoded(suite, task, "train", kind)
            shots = rows.select(draw_few_shot(len(rows), options.shots, options.seed))
            ranking = rank_skills(model.eval(), kind, list(shots))
            order = ranking.top(len(ranking.names), diversity=options.diversity)
            found[task] = {name: ranking.scores[name] for name in order}
            for name, score in found[task].items():
                table.add_row(escape(task), escape(name), f"{score:+.4f}")
    return Result({"run": str(options.run), "scores": found}, (table,))
