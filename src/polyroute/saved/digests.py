"""Digests: SHA-256 sums by which a damaged file is noticed.

The files of an inventory carry the digest of what they hold, so that each can be replaced on its
own.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHA256", "described_digest", "digest_of"]

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
    # As it is read again: keys that are no texts become texts, and have the order of texts.
    read = json.loads(json.dumps(rest))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()
