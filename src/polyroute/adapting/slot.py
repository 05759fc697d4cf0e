"""A slot: one adaptation, and the file that keeps it while it trains."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from polyroute.adapting.settings import AdaptSettings
from polyroute.errors import InputError
from polyroute.host.files import read_metadata
from polyroute.host.json_text import parse_json
from polyroute.kinds.batches import Row
from polyroute.kinds.objectives import Objective
from polyroute.model import RoutedModel

__all__ = ["Slot"]

LONGEST_NAME = 120
COMPARED = 4096
"""About so many numbers of each parameter tell two inventories apart."""


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
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def file(self, folder: Path) -> Path:
        """Where the slot is saved while it trains."""
        return folder / f"{self.name}.safetensors"

    def saved_note(self, folder: Path, digest: str) -> dict[str, Any]:
        """What the slot's file in a folder says besides its tensors.

        Raises:
            InputError: the file is damaged, or that of another slot.
        """
        path = self.file(folder)
        try:
            note: dict[str, Any] = parse_json(read_metadata(path)["slot"], str(path), "delete it")
            # A slot that an older version saved says nothing of what did not exist.
            saved_settings, saved_digest = {"stratify": False, **note["settings"]}, note["digest"]
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is damaged; delete it to start that slot from the beginning"
            ) from error
        if saved_settings != self.settings.to_dict():
            raise InputError(
                f"{path} was written with other settings; name another folder, or delete it"
            )
        if saved_digest != digest:
            raise InputError(
                f"{path} was written for another objective, other examples or another inventory; "
                "name another folder, or delete it"
            )
        return note

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
