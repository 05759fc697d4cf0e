"""The folder that a command writes: checked first, opened when all else is known to be right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.host.processes import is_first
from polyroute.program.options.shared import LIMITS, Given, Options
from polyroute.saved.runs import BEFORE, EXAMPLES, check_run, open_run, read_run, record

__all__ = ["RunFolder"]


class RunFolder:
    """Where a command is to run.

    Args:
        command: its name.
        out: the folder.
        options: say, as far as the command has these options, whether it resumes or overwrites.
        inputs: files and folders that the command reads; None is passed over.

    Raises:
        InputError: the folder holds something that must stay.
    """

    def __init__(
        self, command: str, out: Path, options: Options, inputs: Sequence[str | Path | None] = ()
    ) -> None:
        self.resume = getattr(options, "resume", False)
        self._command = command
        self._place: dict[str, Any] = {
            "resume": self.resume,
            "overwrite": getattr(options, "overwrite", False),
            "inputs": tuple(filter(None, inputs)),
        }
        self.path = check_run(out, command, **self._place)

    @property
    def resumed(self) -> Path | None:
        """The folder, if the run in it is resumed."""
        return self.path if self.resume else None

    def compare_given(self, given: Given) -> None:
        """As `compare`, before anything is loaded.

        Tasks are left out, and limits that are open: only the suite knows what they come to.

        Raises:
            InputError: see `compare`.
        """
        is_open = {"tasks", *(name for name in LIMITS if given.recorded.get(name) is None)}
        self.compare({k: v for k, v in given.recorded.items() if k not in is_open}, given)

    def compare(self, config: Mapping[str, Any], given: Given) -> None:
        """Make sure, of a run to resume, that it was asked for the same; write nothing.

        Raises:
            InputError: it was started with other settings.
        """
        if self.resume:
            record(self.path, self._command, self._known(config, given), resume=True)

    def open(
        self, config: Mapping[str, Any], given: Given, notes: Mapping[str, Any] | None = None
    ) -> Path:
        """Make the folder, or take it up again, and write down what was asked for.

        Args:
            config: what `run.json` is to say.
            given: the options that this came from.
            notes: what `run.json` is to say besides, which is not compared.

        Raises:
            InputError: see `compare`; or another process works there.
        """
        open_run(self.path, self._command, **self._place)
        config = self._known(config, given) if self.resume else config
        record(self.path, self._command, config, resume=self.resume, notes=notes)
        return self.path

    def _known(self, config: Mapping[str, Any], given: Given) -> dict[str, Any]:
        """What is to be compared: where an older run lacks an option, it had what `BEFORE` says.

        What `BEFORE` does not name had the default.
        """
        if not is_first():
            return dict(config)
        before = read_run(self.path)["config"]
        former = {**given.defaults, **BEFORE}
        newer = [name for name in config if name in former and name not in before]
        for name in newer:
            if config[name] != former[name]:
                raise InputError(
                    f"the run in {self.path} is older than the option {name}, whose value was "
                    f"always {former[name]!r}; resume it without that option"
                )
        unknown = [*newer, *({EXAMPLES} - before.keys())]
        return {name: value for name, value in config.items() if name not in unknown}
