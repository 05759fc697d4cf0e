"""Text files that others may have made, no larger than can be read."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, AnyStr

from polyroute.errors import InputError
from polyroute.host.paths import check_file

__all__ = ["MOST", "bounded_lines", "read_text"]

MOST = 2**30
"""Bytes of a file that is read whole."""
LONGEST = 2**28
"""Bytes or characters of a line."""


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        InputError: it is a pipe, a device or too large.
        OSError: it cannot be read.
        UnicodeDecodeError: it is in another encoding.
    """
    check_file(path, most=MOST)
    return path.read_text(encoding=encoding)


def bounded_lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a file, one at a time.

    Raises:
        InputError: a line is too long to be one.
    """
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise InputError(
                f"{path}, line {number} is longer than {LONGEST:,} characters; is this a text file?"
            )
        yield line
