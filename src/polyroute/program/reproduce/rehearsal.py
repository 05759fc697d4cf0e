"""Rehearsal: finding out, before anything is trained, whether every stage can run."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from polyroute.errors import InputError
from polyroute.host import progress
from polyroute.host.memory import give_back_memory
from polyroute.host.output import mode
from polyroute.program.stages import Prepare, Stage

__all__ = ["BEGIN", "rehearse"]

BEGIN = "begin"
"""The command that writes a run as it is before its first step."""


def rehearse(stages: Iterable[Stage], folder: Path, commands: Mapping[str, Prepare]) -> None:
    """Check every stage as its command does, with the data, the base model and the inventory.

    Runs that are not trained yet are written as they begin, in a folder that goes away, so that
    adaptations are planned on an inventory of the right shape. Scores of an average need nothing
    beyond that, so only their options are checked.

    Args:
        stages: in order; those that are done are passed over.
        folder: that of the whole run.
        commands: see `run_preset`; and `BEGIN`, with the options of `train`.

    Raises:
        InputError: a stage could not run. The message says which.
    """
    with TemporaryDirectory() as instead, _unseen():
        begun: dict[str, str] = {}
        for number, stage in enumerate(stages):
            if stage.is_done:
                continue
            given, place = dict(stage.options), str(Path(instead) / str(number))
            for name in ("start", "run"):
                if name in given:
                    given[name] = begun.get(given[name], given[name])
            if stage.command == "train":
                begun[given["out"]] = place
            try:
                if stage.command == "evaluate":
                    commands[stage.command](given)
                elif stage.command == "train":
                    commands[BEGIN]({**given, "out": place})()
                else:
                    commands[stage.command]({**given, "out": place, "dry_run": True})()
            except InputError as error:
                of = stage.result.parent.relative_to(folder)
                raise InputError(f"{error} ({stage.command} of {of})") from error
            give_back_memory()


@contextmanager
def _unseen() -> Iterator[None]:
    """Print nothing: the commands say all of it again when they run."""
    quiet, hidden = mode.quiet, progress.hidden
    mode.quiet = progress.hidden = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        mode.quiet, progress.hidden = quiet, hidden
