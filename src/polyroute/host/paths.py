"""Paths that a user or a file names: where they lead, and whether a file is there."""

import os
import stat
from pathlib import Path

from polyroute.errors import InputError

__all__ = ["check_file", "check_link", "expanded"]

PASSED_ON = ("/dev/fd", "/dev/stdin", "/proc/self/fd")
"""Where a shell passes on what another program prints, which the user asked for."""
KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home folder in place of `~`.

    Raises:
        InputError: there is no such user, or the path has a character that no path has.
    """
    if "\0" in os.fspath(path):
        raise InputError(f"{os.fspath(path)!r} is no path: remove the zero byte from it")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{os.fspath(path)!r} names the home folder of a user who is not known here; write the "
            "whole path"
        ) from error


def check_link(path: Path) -> None:
    """Make sure that a file is no link that leads out of its folder.

    A folder from elsewhere could otherwise show the reader any file of this machine, and what is
    read may be pushed to the hub. The cache of the hub links to files of the same repository.

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
        return  # whoever reads it says that it is missing
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is a link that leads round in a circle") from error
    if not any(named.is_relative_to(place) for place in (folder, *blobs)):
        raise InputError(
            f"{path} is a link that leads out of its folder: copy there what it names, if you "
            "trust it"
        )


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
