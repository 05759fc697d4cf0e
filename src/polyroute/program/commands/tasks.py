"""Which tasks of a suite a command works on."""

from collections.abc import Sequence

from polyroute.data.suite import Suite, check_tasks
from polyroute.errors import InputError
from polyroute.host.output import say
from polyroute.kinds.choose import ModelKind

__all__ = ["chosen_tasks"]


def chosen_tasks(
    suite: Suite, names: Sequence[str] | None, default: Sequence[str], kind: ModelKind, *, none: str
) -> tuple[str, ...]:
    """The tasks that were asked for or, where none was, those of `default` that the kind can use.

    Args:
        suite: where they are.
        names: what was asked for.
        default: what is taken otherwise.
        kind: how the base model learns.
        none: the reason that the error gives where `default` is empty.

    Raises:
        InputError: there is no such task, or the kind cannot use it.
    """
    if kind.supports_generation:
        why, instead = "the objective compares them", "use --objective lm"
    else:
        why = "an encoder base model writes no text"
        instead = "use a text-generating base model"

    def usable(task: str) -> bool:
        return not kind.needs_choices or suite.info(task).has_choices

    if names is not None:
        tasks = check_tasks(suite, names)
        for task in tasks:
            if not usable(task):
                raise InputError(
                    f"task {task!r} has no choices, and {why}: leave the task out, or {instead}"
                )
        return tasks
    if not default:
        raise InputError(f"{none}; choose tasks with --tasks")
    able = [task for task in default if usable(task)]
    if not able:
        raise InputError(f"none of the {len(default)} tasks has choices, and {why}: {instead}")
    if len(able) < len(default):
        say(f"left out {len(default) - len(able)} tasks without choices: {why}")
    return check_tasks(suite, able)
