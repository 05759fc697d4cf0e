"""The metrics of a training, as the folder of its run keeps them."""

import os
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.host.files import read_json

__all__ = ["METRICS", "read_metrics"]

METRICS = "metrics.json"
"""Written last: a training whose run has it is finished."""
TOTALS = ("steps", "trained_parameters", "train_runtime", "eval_loss")
LOGGED = ("step", "loss", "eval_loss", "route_entropy", "skill_cosine")
"""What is read of an entry of the log. What was not finite is None."""
FIX = "delete it, and `polyroute train --resume` writes it again"


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metrics of a training: its totals, and as `log` the entries of its log.

    Raises:
        InputError: the file is missing, or is not what a training writes.
    """
    path = Path(folder) / METRICS
    metrics = read_json(path)
    log = metrics.get("log") if isinstance(metrics, dict) else None
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise InputError(f"{path} is damaged: it has no log of a training; {FIX}")
    for entry, names in ((metrics, TOTALS), *((entry, LOGGED) for entry in log)):
        wrong = [name for name in names if not _is_number(entry.get(name))]
        if wrong:
            raise InputError(f"{path} is damaged: {wrong[0]} is {entry[wrong[0]]!r}; {FIX}")
    return dict(metrics)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
