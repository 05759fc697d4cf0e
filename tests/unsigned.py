"""Inventories without digests, as older versions wrote them: what they say may be changed."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polyroute.saved.digests import SHA256
from polyroute.saved.shards import NOTE


def without_digests(folder: Path) -> Path:
    """Take the digests out of all files of an inventory, in place."""
    path = folder / "polyroute.json"
    description = json.loads(path.read_text())
    description.pop(SHA256, None)
    path.write_text(json.dumps(description))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            note = json.loads(opened.metadata()[NOTE])
        note.pop(SHA256, None)
        save_file(load_file(file), file, {NOTE: json.dumps(note)})
    return folder
