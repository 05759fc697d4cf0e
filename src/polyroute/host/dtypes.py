"""Types of a base model's weights, by name, and which of them this machine multiplies fast.

The command line's help needs the names, so torch is imported only where it is asked.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from polyroute.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AUTO", "DTYPES", "are_finite_fractions", "has_fast_bfloat16", "settled_dtype"]

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Either of these says that a CPU has instructions for products of bfloat16."""


def settled_dtype(name: str) -> str:
    """The name of a type; for `"auto"`, bfloat16 where the hardware multiplies it fast.

    Raises:
        InputError: there is no such type.
    """
    if name == AUTO:
        return "bfloat16" if has_fast_bfloat16() else "float32"
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not supported: {did_you_mean(name, (AUTO, *DTYPES))}")
    return name


def are_finite_fractions(values: "Tensor") -> bool:
    """Whether a tensor from a file has values, of a type with fractions of 16 bits or more."""
    import torch

    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    is_plain = values.dtype in types and values.layout == torch.strided and not values.is_meta
    return is_plain and bool(values.isfinite().all())


def has_fast_bfloat16() -> bool:
    """Whether the accelerator or, where there is none, the CPU has instructions for bfloat16."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.accelerator.is_available():
        return False  # torch does not say of other accelerators how fast they are
    return torch._C._has_mkldnn and not BFLOAT16_FLAGS.isdisjoint(_cpu_flags())


def _cpu_flags() -> set[str]:
    """The names of the instruction sets of the CPU, as far as they are known."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)  # older versions lack it
    if capabilities is not None:
        return {name for name, value in capabilities().items() if value is True}
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return set()
