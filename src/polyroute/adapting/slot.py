"""A slot: one adaptation, and the file that keeps it while it trains."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from polyroute.adapting.settings import AdaptSettings
from polyroute.errors import InputError
from polyroute.host.files import read_metadata, read_tensors, write_tensors
from polyroute.host.json_text import parse_json
from polyroute.host.paths import check_readable
from polyroute.kinds.batches import Row
from polyroute.kinds.objectives import Objective
from polyroute.model import RoutedModel
from polyroute.saved.digests import SHA256, digest_of
from polyroute.task_names import shortened

__all__ = ["ANEW", "Slot", "read_slot", "write_slot"]

COMPARED = 4096
"""About so many numbers of each parameter tell two inventories apart."""
NOTE = "slot"
"""The metadata of a slot's file."""
ENTRIES = {"settings", "digest", "losses", "best_step", "best_loss", "stale", "seconds", SHA256}
"""All that it can say, of any version."""
ANEW = "delete it to start that slot from the beginning"


@dataclass(frozen=True)
class Slot:
    """One adaptation: a task's examples, a seed, and settings."""

    task: str
    seed: int
    settings: AdaptSettings
    rows: Sequence[Row]
    """The encoded training examples."""
    validation_rows: Sequence[Row] = ()
    """The encoded examples that choose the best step."""
    label: str = ""
    """What sets its settings apart from those of other slots; empty where they are alike."""
    indices: Sequence[int] = ()
    """Which of the task's examples `rows` are."""
    validation_indices: Sequence[int] = ()
    """Which of the task's examples `validation_rows` are."""

    @property
    def name(self) -> str:
        """What the files of this slot are called."""
        parts = [quote(self.task, safe=""), f"seed-{self.seed}"]
        name = "-".join([*parts, quote(self.label, safe="=,")] if self.label else parts)
        return shortened(name)

    def file(self, folder: Path) -> Path:
        """Where the slot is saved while it trains."""
        return folder / f"{self.name}.safetensors"

    def saved(self, folder: Path, digest: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the slot's file in a folder says and holds.

        Raises:
            InputError: the file is damaged, or that of another slot.
        """
        path = self.file(folder)
        note, tensors = read_slot(path)
        try:
            # A slot that an older version saved says nothing of what did not exist.
            saved_settings, saved_digest = {"stratify": False, **note["settings"]}, note["digest"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; {ANEW}") from error
        if saved_settings != self.settings.to_dict():
            raise InputError(
                f"{path} was written with other settings; name another folder, or delete it"
            )
        if saved_digest != digest:
            raise InputError(
                f"{path} was written for another objective, other examples or another inventory; "
                "name another folder, or delete it"
            )
        return note, tensors

    def digest(self, model: RoutedModel, objective: Objective) -> str:
        """A hash of the examples, the objective and the inventory that the slot starts from."""
        columns = ("prompt_ids", "target_ids", "choice_ids", "label")
        rows = [[row[c] for c in columns] for row in (*self.rows, *self.validation_rows)]
        total = hashlib.sha256(json.dumps([repr(objective), len(self.rows), rows]).encode())
        logits = model.routes.logits
        for parameter in (*model.inventory.parameters(), *([] if logits is None else [logits])):
            # A sample is enough; hashing all of a large inventory would take long.
            some = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // COMPARED)]
            total.update(some.float().cpu().numpy().tobytes())
        return total.hexdigest()


def write_slot(path: Path, note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the file of a running slot: what it says, what it holds, and a digest of both."""
    signed = {**note, SHA256: digest_of(tensors, note)}
    write_tensors(path, tensors, metadata={NOTE: json.dumps(signed)})


def read_slot(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_slot` wrote.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    check_readable(path)
    try:
        text, tensors = read_metadata(path)[NOTE], read_tensors(path)
    except InputError as error:
        raise InputError(f"{error}; {ANEW}") from error
    except KeyError as error:
        raise InputError(f"{path} is damaged; {ANEW}") from error
    note = parse_json(text, f"the note in {path}", ANEW)
    if not isinstance(note, dict) or note.keys() - ENTRIES:
        raise InputError(f"{path} is damaged: its note is not that of a slot; {ANEW}")
    # Older versions wrote no digest.
    if SHA256 in note and note.pop(SHA256) != digest_of(tensors, note):
        raise InputError(f"{path} is damaged: it does not hold what was saved; {ANEW}")
    return note, tensors
