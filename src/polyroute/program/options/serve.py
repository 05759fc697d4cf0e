"""Options of `polyroute serve`."""

from dataclasses import dataclass
from pathlib import Path

from polyroute.program.options.shared import REQUIRED, RUN_HELP, Options
from polyroute.settings import number, setting, text, whole

__all__ = ["ServeOptions"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Options of `polyroute serve`."""

    run: Path = setting(REQUIRED, argument=True, help=RUN_HELP)
    host: str = setting(
        "127.0.0.1", text(),
        help="Address to listen at; 0.0.0.0 lets other machines in, which needs --api-keys.",
    )  # fmt: skip
    port: int = setting(8000, whole(0, most=65535), help="Port to listen at; 0 for any free one.")
    tasks_dir: Path | None = setting(
        None, help="Folder for tasks that clients add, made if missing [they can add none]."
    )
    api_keys: Path | None = setting(
        None,
        help="File of keys, one on each line, each followed by what the names of its tasks begin "
        "with, if it is to see only those.",
    )
    max_length: int | None = setting(
        None, whole(optional=True),
        help="Most tokens of a prompt and its answer together [2048, or the model's positions].",
    )  # fmt: skip
    max_batch: int = setting(32, whole(), help="Most requests that are computed at once.")
    max_waiting: int = setting(224, whole(0), help="Most requests that wait; others get a 429.")
    timeout: float = setting(600.0, number(above=0), help="Seconds that a request may take.")
