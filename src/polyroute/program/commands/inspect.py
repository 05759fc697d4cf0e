"""`polyroute inspect`: what a run holds, and how its routes relate to categories of tasks."""

from pathlib import Path

from polyroute.errors import InputError
from polyroute.host.output import Result
from polyroute.loading import load_suite
from polyroute.program.commands.runs import inventory_of
from polyroute.program.options.finished import InspectOptions
from polyroute.saved.hub import locate
from polyroute.study.analysis import analyse, describe_checkpoint

__all__ = ["inspect_run"]


def inspect_run(options: InspectOptions) -> Result:
    """What a run holds and, given a suite, how routes relate to its categories.

    Raises:
        InputError: the folder holds no inventory; or, given a suite, it cannot be read, or the
            tasks have no routes or no categories to compare.
    """
    run, data = Path(locate(options.run)), options.data
    checkpoint = inventory_of(run)
    description = checkpoint.description
    document = {
        "run": options.run,
        "config": description["config"],
        "base": {name: description["base"][name] for name in ("name", "class")},
        "skills": description["num_skills"],
        "sites": len(description["sites"]),
        "routers": len(description["routers"]),
        "tasks": checkpoint.tasks,
    }
    account = describe_checkpoint(checkpoint)
    categories: dict[str, str] | None = None
    if data is not None:
        suite = load_suite(data, options.reader)
        categories = {t: suite.info(t).category for t in checkpoint.tasks if t in suite.tasks}
    try:
        analysis = analyse(checkpoint, categories)
    except InputError:
        if categories is not None:
            raise
        return Result({**document, "routing": None}, (account,))
    result = {**document, "routing": analysis.to_dict()}
    if categories is None:
        return Result(result, (account,))
    relation = analysis.relation
    if relation is None:
        raise InputError(f"{data} groups the tasks of {run} into no categories that say something")
    related = (
        f"  {relation.tasks} tasks in {relation.categories} categories:\n"
        f"    adjusted Rand index of clusters by route: {relation.ari:.3f}\n"
        f"    nearest task is of the same category: {relation.purity:.3f} "
        f"(by chance {relation.chance:.3f}, p {relation.p:.4f})"
    )
    return Result(result, (account, related))
