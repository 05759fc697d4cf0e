"""Printing on the command line: results for people or for programs, and notes."""

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyroute.host.printable import printable
from polyroute.host.processes import is_first

__all__ = ["Result", "mode", "reset", "running", "say", "show"]

NOISY = (
    "accelerate",
    "datasets",
    "filelock",
    "huggingface_hub",
    "torch",
    "torchao",
    "transformers",
)
"""The loggers of libraries that are silenced."""


@dataclass
class Mode:
    """How the running command prints, and what it may run."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    trust_remote_code: bool = False
    depth: int = 0
    """How many commands are running inside each other."""


mode = Mode()


@dataclass(frozen=True)
class Result:
    """The result of a command."""

    document: Mapping[str, Any]
    """The result for programs, as JSON values; numbers are not rounded."""
    shown: tuple[Any, ...]
    """The result for people: sentences, and tables of rich."""


def reset() -> None:
    """Restore the default mode, which an earlier command of this process may have changed."""
    vars(mode).update(vars(Mode()))


def say(text: str) -> None:
    """Print a note on standard output; with `--json`, on standard error."""
    if not mode.quiet:
        _print(text)


def show(result: Result) -> None:
    """Print the result of a command; a command inside another prints it as a note."""
    if mode.depth == 0 and mode.json and is_first():
        _print(json.dumps(_plain(result.document), indent=1, allow_nan=False))
    elif mode.depth == 0 or not mode.quiet:
        for part in result.shown:
            _print(part)


def _print(part: Any) -> None:
    if not is_first():  # only one of several processes prints
        return
    from polyroute.host.progress import aside

    with aside():
        _write(part)


def _write(part: Any) -> None:
    if isinstance(part, str):
        print(printable(part))  # not through rich, which would wrap paths
        return
    from rich.console import Console
    from rich.segment import Segment, Segments

    # Files and pipes have no width; tables would break at the default of 80 columns.
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if has_width else 160)
    shown = [Segment(printable(s.text), s.style, s.control) for s in console.render(part)]
    console.print(Segments(shown), end="")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has neither NaN nor infinity
    return str(value) if isinstance(value, Path) else value


@contextmanager
def running() -> Iterator[None]:
    """Run a command within the block: its output follows the mode, and libraries are silenced.

    With `--verbose` libraries log as usual. With `--json` everything but the result goes to
    standard error.
    """
    if mode.depth:
        with _deeper():
            yield
        return
    from polyroute.host import progress

    former, progress.hidden = progress.hidden, mode.quiet or not is_first()
    try:
        with redirect_stdout(sys.stderr if mode.json else sys.stdout), _libraries(), _deeper():
            yield
    finally:
        progress.hidden = former


@contextmanager
def _deeper() -> Iterator[None]:
    mode.depth += 1
    try:
        yield
    finally:
        mode.depth -= 1


@contextmanager
def _libraries() -> Iterator[None]:
    """Within the block, libraries log only errors, unless `--verbose` is given."""
    import torch  # noqa: F401 - its import sets the level of its logger

    levels = {name: logging.getLogger(name).level for name in NOISY}
    if not mode.verbose:  # before the imports, because some libraries log while they are imported
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not mode.verbose:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"polyroute\.")
        import huggingface_hub.utils
        import transformers.utils.logging

        downloads: Any = huggingface_hub.utils
        library: Any = transformers.utils.logging

        former, warnings.formatwarning = warnings.formatwarning, _sentence
        verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
        library.set_verbosity(logging.INFO if mode.verbose else logging.ERROR)
        if not mode.verbose:
            library.disable_progress_bar()  # it also disables the bars of downloads
            if sys.stderr.isatty():
                downloads.enable_progress_bars()
        try:
            yield
        finally:
            warnings.formatwarning = former
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _sentence(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as a command prints it: where in the source it arose helps no user."""
    return f"polyroute: warning: {printable(str(message))}\n"
