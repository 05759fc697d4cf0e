"""Digests: SHA-256 sums by which a damaged file is noticed.

The files of an inventory carry the digest of what they hold, so that each can be replaced on its
own. What a trainer writes beside them is listed in a manifest.
"""

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.host.files import read_json, write_json
from polyroute.saved.hub import DESCRIPTION, MODULES, SHARDS, SKILLS

__all__ = [
    "MANIFEST",
    "SHA256",
    "check_manifest",
    "described_digest",
    "digest_of",
    "write_manifest",
]

MANIFEST = "manifest.json"
SHA256 = "sha256"
"""The entry that holds a digest."""


def digest_of(tensors: Mapping[str, Tensor], *notes: object) -> str:
    """The digest of tensors, with their names, types and shapes, and of JSON values."""
    total = hashlib.sha256(json.dumps(notes).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # On a CPU no tensor is copied; on another device they are copied one by one.
        flat = tensor.cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def described_digest(description: Mapping[str, Any]) -> str:
    """The digest of a description, without the entry that holds it."""
    rest = {key: value for key, value in description.items() if key != SHA256}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write down the size and the digest of every file in a folder that has no digest itself."""
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
    if not isinstance(known, dict):
        raise InputError(f"{path} is damaged")
    for name, entry in known.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise InputError(f"{file} is missing")
        if not isinstance(entry, dict) or _entry(file) != entry:
            raise InputError(f"{file} is damaged: its content is not what {MANIFEST} says")


def _is_listed(path: Path) -> bool:
    others = (MANIFEST, DESCRIPTION, SKILLS, MODULES, SHARDS, ".*")
    return path.is_file() and not any(fnmatch(path.name, pattern) for pattern in others)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, SHA256).hexdigest()
    return {"bytes": path.stat().st_size, SHA256: digest}
