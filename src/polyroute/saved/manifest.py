"""The manifest of a folder: the digests of its files that have none themselves.

A checkpoint has one, for what a trainer writes beside the inventory, and so has an adapter.
"""

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.host.files import read_json, write_json
from polyroute.host.paths import check_readable
from polyroute.saved.digests import SHA256
from polyroute.saved.hub import CARD, DESCRIPTION, MODULES, SHARDS, SKILLS

__all__ = ["MANIFEST", "check_manifest", "write_manifest"]

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write down the size and the digest of every file in a folder that has no digest itself.

    The card is left out, because users may change it.
    """
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if _is_listed(path)}
    write_json(folder / MANIFEST, files)


def check_manifest(folder: Path) -> None:
    """Compare the files of a folder with its manifest, if it has one.

    Raises:
        InputError: a file is missing or changed, or the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():  # an older version wrote the folder
        return
    known = read_json(path)
    if not isinstance(known, dict) or not known:
        raise InputError(f"{path} is damaged: it lists no file")
    for name, entry in known.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise InputError(f"{file} is missing")
        check_readable(file)
        if not isinstance(entry, dict) or _entry(file) != entry:
            raise InputError(f"{file} is damaged: its content is not what {MANIFEST} says")


def _is_listed(path: Path) -> bool:
    others = (MANIFEST, CARD, DESCRIPTION, SKILLS, MODULES, SHARDS, ".*")
    return path.is_file() and not any(fnmatch(path.name, pattern) for pattern in others)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, SHA256).hexdigest()
    return {"bytes": path.stat().st_size, SHA256: digest}
