"""What a reader does not read in a folder of tasks; it says so once."""

from collections.abc import Iterable
from pathlib import Path

from polyroute.errors import first_few
from polyroute.host.output import say

__all__ = ["tell_ignored"]

_NOT_DATA = ("readme", "license", "licence", "roles", "dataset_dict")
"""Names, without their endings, of files that nobody takes for examples."""
_PAGES = (".md", ".markdown")
_SHOWN = 8


def tell_ignored(folder: Path, used: Iterable[Path]) -> None:
    """Name the files and folders in a folder that were not used, in one line.

    Args:
        folder: the folder.
        used: the paths in it that are read.
    """
    read = set(used)
    left = [
        path.name + "/" * path.is_dir()
        for path in sorted(folder.iterdir())
        if path not in read
        and not path.name.startswith(".")
        and path.suffix.lower() not in _PAGES
        and path.stem.lower() not in _NOT_DATA
    ]
    if left:
        say(f"ignored in {folder.name}: {first_few(left, _SHOWN)}")
