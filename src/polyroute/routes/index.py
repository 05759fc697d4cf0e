"""Small lists of whole numbers, copied to a device without making the host wait."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["index_on"]


def index_on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Whole numbers as a tensor `[n]` on a device; the caller must not change it.

    The host does not wait for the device. On CUDA the latest tensors are kept, so a step that
    repeats the tasks of an earlier one copies nothing, as a CUDA graph requires.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.long, device=device)
    # One tensor for each stream, because nothing makes another stream wait for the copy.
    return _kept_index(device, numbers, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=64)
def _kept_index(device: torch.device, numbers: tuple[int, ...], _: int) -> Tensor:
    with torch.inference_mode(False):  # autograd may use a kept tensor later
        on_host = torch.tensor(numbers, dtype=torch.long, device="cpu", pin_memory=True)
        return on_host.to(device, non_blocking=True)
