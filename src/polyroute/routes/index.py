"""Small lists of whole numbers on a device, without making the host wait."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["index_on"]


def index_on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Whole numbers `[n]` on a device, without making the host wait for it; not to be changed.

    On CUDA the last ones are kept: a step that repeats the tasks of an earlier one copies nothing,
    as a CUDA graph needs.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.long, device=device)
    # By stream, because nothing else makes another stream wait for the copy.
    return _kept_index(device, numbers, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=64)
def _kept_index(device: torch.device, numbers: tuple[int, ...], _: int) -> Tensor:
    with torch.inference_mode(False):  # what is kept may later meet autograd
        on_host = torch.tensor(numbers, dtype=torch.long, device="cpu", pin_memory=True)
        return on_host.to(device, non_blocking=True)
