"""What polyroute keeps in a trainer's checkpoint, beside what `Trainer` does."""

from typing import Any

__all__ = ["KEPT", "kept_by"]

KEPT = "polyroute"
"""Its place in `TrainerState.stateful_callbacks`, which checkpoints hold."""


def kept_by(callbacks: Any) -> dict[str, Any]:
    """What was kept, from the `stateful_callbacks` of a state; empty in older checkpoints."""
    found = callbacks.get(KEPT) if isinstance(callbacks, dict) else None
    return found if isinstance(found, dict) else {}
