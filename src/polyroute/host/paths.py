"""Paths that a user or a file names: where they lead, and whether a file is there."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyroute.errors import InputError

__all__ = ["check_file", "check_link", "check_readable", "expanded", "path_of", "reading"]

LONGEST = 255
"""Bytes of a name of a file or folder, in every usual file system."""

PASSED_ON = ("/dev/fd", "/dev/stdin", "/proc/self/fd")
"""Where a shell passes on what another program prints, which the user asked for."""
KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def path_of(given: str | os.PathLike[str]) -> Path:
    """A path that a caller gave, if a file or folder could have it.

    Raises:
        InputError: it is no path or empty, has a character that no path has, or a name in it is too
            long.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str):
        raise InputError(f"a path must be a text or a pathlib.Path, not {given!r}")
    if not text:
        raise InputError("a path is empty; name a file or a folder, such as '.' for this one")
    if "\0" in text:
        raise InputError(f"{text!r} is no path: remove the zero byte from it")
    try:
        longest = max(len(os.fsencode(part)) for part in Path(text).parts or ("",))
    except UnicodeEncodeError as error:
        raise InputError(
            f"{text!r} is no path: it has a character that cannot be written"
        ) from error
    if longest > LONGEST:
        raise InputError(
            f"the path {text[:LONGEST]!r} has a name of {longest} bytes in it, and names of files "
            f"and folders have at most {LONGEST}; shorten it"
        )
    return Path(given)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home folder in place of `~`.

    Raises:
        InputError: there is no such user, or as `path_of`.
    """
    given = path_of(path)
    try:
        return given.expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{os.fspath(path)!r} names the home folder of a user who is not known here; write the "
            "whole path"
        ) from error


def check_link(path: Path) -> None:
    """Make sure that a file is no link that leads out of its folder.

    A folder from elsewhere could otherwise show the reader any file of this machine, and what is
    read may be pushed to the hub; and what is written to it could land anywhere. The cache of the
    hub links to files of the same repository.

    Raises:
        InputError: it is such a link.
    """
    if not path.is_symlink():
        return
    folder = path.parent.resolve()
    # The cache of the hub: models--user--name/snapshots/COMMIT/file links to ../../blobs/HASH.
    blobs = [
        (place.parent / "blobs").resolve()
        for place in folder.parents
        if place.name == "snapshots" and place.parent.name.startswith(("models--", "datasets--"))
    ]
    try:
        named = path.resolve(strict=True)
    except FileNotFoundError:
        named = path.resolve()  # whoever writes to it would make what it names
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is a link that leads round in a circle") from error
    if not any(named.is_relative_to(place) for place in (folder, *blobs)):
        raise InputError(
            f"{path} is a link that leads out of its folder: remove it, or copy there what it "
            "names, if you trust it"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in a sentence why the system does not let the block read a file.

    Raises:
        InputError: it does not.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def check_readable(path: Path) -> None:
    """Make sure that a file is one, and that it can be opened; libraries say less clearly why not.

    Raises:
        InputError: it is missing, a folder, a pipe or a device, a link that leads out of its
            folder, or not permitted to be read.
    """
    check_link(path)
    check_file(path)
    with reading(path):
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a file; replace it")
        path.open("rb").close()


def check_file(path: Path, *, most: int | None = None) -> None:
    """Make sure that a path is no pipe or device, which may never end, and not too large.

    Args:
        path: the file; what is missing or a folder is left to whoever reads it.
        most: bytes that it may have.

    Raises:
        InputError: it is a pipe or a device, or larger.
    """
    if str(path).startswith(PASSED_ON):
        return
    try:
        found = path.stat()
    except (OSError, ValueError):
        return
    kind = KINDS.get(stat.S_IFMT(found.st_mode))
    if kind:
        raise InputError(f"{path} is {kind}, not a file; replace it")
    if most is not None and found.st_size > most:
        raise InputError(
            f"{path} has {found.st_size:,} bytes, and at most {most:,} of such a file are read; "
            "replace or split it"
        )
