"""Stages: commands that a longer command runs, each with a folder or file of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyroute.host.memory import give_back_memory
from polyroute.saved.runs import RUNNING

__all__ = ["Prepare", "Stage"]

Prepare = Callable[[Mapping[str, Any]], Callable[[], None]]
"""Takes the options of a command and checks them; what it returns runs the command."""


@dataclass(frozen=True)
class Stage:
    """One command, and the file that it writes last."""

    command: str
    options: Mapping[str, Any]
    """As a file of options gives them; the command checks them."""
    result: Path

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.is_file() and not (self.result.parent / RUNNING).exists()

    def run(self, commands: Mapping[str, Prepare]) -> None:
        """Run the command, or what is left of it."""
        if self.is_done:
            return
        options = self.options
        if self.command in ("train", "adapt"):
            is_begun = (self.result.parent / "run.json").is_file()
            options = {**options, "resume": is_begun}
        commands[self.command](options)()
        give_back_memory()
