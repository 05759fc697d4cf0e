"""Text files that others may have made: no pipes, no devices, and no more than can be read."""

from collections.abc import Generator, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, AnyStr

from polyroute.errors import InputError
from polyroute.host.paths import check_file

__all__ = ["LONGEST_LINE", "byte_lines", "check_size", "read_text", "text_lines"]

MOST_BYTES = 2**31
"""Of a file that is read whole."""
LONGEST_LINE = 2**28
"""In bytes, or in characters of text."""


def check_size(path: Path) -> None:
    """Make sure that a file can be read whole.

    Raises:
        InputError: the path is a pipe or a device, or the file is too large.
    """
    check_file(path, most=MOST_BYTES)


def read_text(path: Path | Traversable, encoding: str = "utf-8") -> str:
    """The text of a file, which may be a resource of a package.

    Raises:
        InputError: the path is a pipe or a device, or the file is too large.
        OSError: it cannot be read.
        UnicodeDecodeError: it is in another encoding.
    """
    if isinstance(path, Path):
        check_size(path)
    return path.read_text(encoding=encoding)


def byte_lines(path: Path) -> Iterator[bytes]:
    r"""The lines of a file, which end at `\n` alone.

    Raises:
        InputError: the path is a pipe or a device, or a line is too long to be one.
        OSError: the file cannot be read.
    """
    check_file(path)
    with path.open("rb") as file:
        yield from _bounded(file, path)


def text_lines(path: Path, encoding: str) -> Generator[str]:
    """The lines of a text, whose ends stay as they are.

    Raises:
        InputError: the path is a pipe or a device, or a line is too long to be one.
        OSError: the file cannot be read.
        UnicodeDecodeError: it is in another encoding.
    """
    check_file(path)
    with path.open(encoding=encoding, newline="") as file:
        yield from _bounded(file, path)


def _bounded(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{path}, line {number} is longer than {LONGEST_LINE:,} characters; split it, or "
                "remove the file if it is no text"
            )
        yield line
