"""What the command line prints: results for people or for programs, notes, and nothing else."""

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
"""Loggers of libraries."""


@dataclass
class Mode:
    """How the running command prints."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    depth: int = 0
    """Commands that run inside each other."""


mode = Mode()


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    document: Mapping[str, Any]
    """For programs, as JSON values; numbers are not rounded."""
    shown: tuple[Any, ...]
    """For people: sentences, and tables of rich."""


def reset() -> None:
    """Forget how an earlier command of this process was to print."""
    vars(mode).update(vars(Mode()))


def say(text: str) -> None:
    """Print a note: on standard output or, where that is for JSON, on standard error."""
    if not mode.quiet:
        _print(text)


def show(result: Result) -> None:
    """Print the result of a command; that of a command inside another is a note."""
    if mode.depth == 0 and mode.json and is_first():
        _print(json.dumps(_plain(result.document), indent=1, allow_nan=False))
    elif mode.depth == 0 or not mode.quiet:
        for part in result.shown:
            _print(part)


def _print(part: Any) -> None:
    if not is_first():  # of several processes one speaks
        return
    if isinstance(part, str):
        print(part)  # as it is: paths are not wrapped
        return
    from rich.console import Console

    # Nothing says how wide a file or a pipe is; at the usual 80 columns tables would be cut up.
    is_free = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    Console(width=160 if is_free else None).print(part)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such numbers
    return str(value) if isinstance(value, Path) else value


@contextmanager
def running() -> Iterator[None]:
    """Run a command: what it prints goes where the mode says, and libraries keep quiet.

    With `--verbose` libraries say what they do. With `--json` all goes to standard error.
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
    """Libraries say what went wrong or, with `--verbose`, all; their settings come back."""
    import torch  # noqa: F401 - which sets the level of its logger

    levels = {name: logging.getLogger(name).level for name in NOISY}
    if not mode.verbose:  # before they are imported, which some do loudly
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

        verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
        library.set_verbosity(logging.INFO if mode.verbose else logging.ERROR)
        if not mode.verbose:
            library.disable_progress_bar()  # of reading weights, and of downloads, which take long
            if sys.stderr.isatty():
                downloads.enable_progress_bars()
        try:
            yield
        finally:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
