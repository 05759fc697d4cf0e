"""A run, and the tasks of a suite that a command uses it for."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from polyroute.build import loaded
from polyroute.data.suite import Suite, held_out_tasks, validate
from polyroute.kinds.choose import ModelKind
from polyroute.loading import load_suite
from polyroute.model import RoutedModel
from polyroute.program.commands.runs import base_of, inventory_of
from polyroute.program.commands.tasks import chosen_tasks
from polyroute.program.options.shared import Limits, Source
from polyroute.saved.checkpoint import Checkpoint
from polyroute.saved.hub import locate

__all__ = ["Opened", "opened"]


@dataclass(frozen=True)
class Opened:
    """A run, and tasks of a suite that it is used for."""

    run: Path
    checkpoint: Checkpoint
    base: nn.Module
    kind: ModelKind
    suite: Suite
    tasks: Sequence[str]

    def attached(self) -> AbstractContextManager[RoutedModel]:
        """The inventory on its base model, within a `with` block."""
        return loaded(self.base, self.checkpoint, self.run)


def opened(
    run: Path,
    source: Source,
    needs: Sequence[str],
    *,
    are_learned: bool = False,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Opened:
    """Read a run, and choose tasks.

    Args:
        run: as the user named it.
        source: the suite, and tasks of it.
        needs: the splits that every task must have.
        are_learned: whether the tasks are by default those of the run that the suite has, and not
            those that the suite holds out.
        limits: see `base_of`.

    Raises:
        InputError: the run, the data or a task cannot be used.
    """
    place = Path(locate(run))
    checkpoint = inventory_of(place)
    suite = load_suite(source.data, source.reader)
    base, kind = base_of(place, limits=limits)
    default, none = held_out_tasks(suite), f"{source.data} has no held-out task"
    if are_learned:
        default = tuple(task for task in checkpoint.tasks if task in suite.tasks)
        none = f"{source.data} has none of the tasks of {place}"
    tasks = chosen_tasks(suite, source.tasks, default, kind, none=none)
    validate(suite, tasks, needs=needs)
    return Opened(place, checkpoint, base, kind, suite, tasks)
