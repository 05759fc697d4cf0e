"""Where the CPU time of a training step goes, by kind of work, for `smollm2.py`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["measured"]

LARGE = 128
"""A product is large if it has at least so many rows, columns and terms; those of an adapter have
its rank in one of them."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_")
GROUPS = {
    "softmax and loss": ("softmax", "nll_loss"),
    "copies and types": (
        "copy_",
        "cat",
        "fill_",
        "zero_",
        "index",
        "scatter",
        "gather",
        "embedding",
    ),
    "norms": ("pow", "mean", "rsqrt", "sum", "linalg", "norm"),
    "activations": ("silu", "sigmoid"),
    "arithmetic": ("mul", "add", "sub", "neg", "div", "where", "masked"),
    "optimizer": ("adam",),
}
"""Kinds of work by what names of operations hold, the first that fits."""


def measured(steps: Sequence[Callable[[], Any]]) -> dict[str, Any]:
    """Self CPU seconds of steps by kind of work, and how fast the large products are.

    Profiling itself costs time in every operation, so shares of many small ones are a little high.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for step in steps:
            step()
    seconds: dict[str, float] = {}
    flops = 0.0
    for event in found.key_averages(group_by_input_shape=True):
        group, work = _group(event.key, event.input_shapes)
        seconds[group] = seconds.get(group, 0.0) + event.self_cpu_time_total / 1e6
        if group == "large products":
            flops += event.count * work
    return {
        "seconds": dict(sorted(seconds.items(), key=lambda item: -item[1])),
        "gflops": flops / seconds["large products"] / 1e9,
    }


def _group(name: str, shapes: Sequence[Any]) -> tuple[str, float]:
    """The kind of work, and the operations of a product."""
    if name in PRODUCTS:
        a, b = [shape for shape in shapes if len(shape) >= 2][-2:]
        sizes = (*a, b[-1])
        work = 2.0
        for size in sizes:
            work *= size
        return ("large" if min(sizes[-3:]) >= LARGE else "small") + " products", work
    short = name.removeprefix("aten::")
    for group, parts in GROUPS.items():
        if any(part in short for part in parts):
            return group, 0.0
    return "everything else", 0.0
