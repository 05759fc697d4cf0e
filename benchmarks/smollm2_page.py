"""The tables of `smollm2.py` on the page of benchmarks."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import summarise

__all__ = ["smollm2_lines"]

REFERENCE = "PEFT LoRA"
DTYPES = ("bfloat16", "float32")
TITLES = {
    "step": "training step",
    "scores": "scoring ten choices a prompt",
    "generation": "generating 32 tokens",
}
INTRODUCTION = """\
`benchmarks/smollm2.py`: 16 rows of 8 tasks; prompts of 20 to 200 tokens, targets of 2 to 6. PEFT's
models run as users run them: padded rows, logits of all tokens, and each choice with its own copy
of the prompt. The frozen base is scored and generates through polyroute's own code without an
inventory, so polyroute's distance to it is the price of the adapters. Times are CPU seconds. Ratios
are to PEFT LoRA, medians and quartiles over rounds. Peaks are those of a process of its own. The
two types were measured on different machines.
"""
ADAPTING = """\
Nine adaptations ({tasks} tasks x {seeds} seeds, {shots} examples a step, {steps} steps, phase
`mu`) in one run, against nine runs of one. *Commands* are whole runs of `polyroute adapt`, with
starting, loading and scoring; *training* is `adapt_many` in one process. Each adaptation has an
adapter of its own in every layer, so one run saves starting and loading, but no products. Ratios
are to the nine runs of the same kind.
"""
SHARING = """\
One step of one adaptation (forward and backward, phase `mu`, {shots} examples of a real task of the
suite). *Shared* computes what the prompts begin with once, *apart* for each example. Ratios are to
*apart*, of the same task.
"""
PROFILE = """\
Where a training step of polyroute goes, by torch's profiler. Large products are those of the base
model's weights; they ran at {gflops:.0f} GFLOP/s. Small ones are those of attention
and of the adapters.
"""


def smollm2_lines(
    results: Path, table: Callable[[Sequence[str], Iterable[Sequence[str]]], list[str]]
) -> list[str]:
    """The section; nothing where nothing was measured.

    Args:
        results: the folder of results.
        table: makes the lines of a table.
    """
    paths = {dtype: results / f"smollm2-{dtype}.json" for dtype in DTYPES}
    lines = []
    for dtype, path in paths.items():
        if path.exists():
            cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
            lines += [f"### The base model in {dtype}", "", *_section(cases, table)]
    return ["## SmolLM2-135M on a CPU", "", INTRODUCTION, *lines] if lines else []


def _section(
    cases: Mapping[str, Mapping[str, Any]],
    table: Callable[[Sequence[str], Iterable[Sequence[str]]], list[str]],
) -> list[str]:
    """The tables of one type of the base model."""
    lines: list[str] = []
    for name, title in TITLES.items():
        if name in cases:
            lines += table([title, "CPU seconds", "ratio", "GB at the peak"], _rows(cases[name]))
            lines += [_about(cases[name]), ""]
    if "adapt" in cases:
        case = cases["adapt"]
        words = {**case, "tasks": len(case["tasks"]), "seeds": len(case["seeds"])}
        lines += [ADAPTING.format(**words)]
        clock = [row[1:] for row in _adapted(case, "clock_seconds")]
        both = [[*cpu, *own] for cpu, own in zip(_adapted(case), clock, strict=True)]
        head = ["adapting", "CPU seconds", "ratio", "seconds by the clock", "ratio"]
        lines += table(head, both)
        lines += [_about(case), ""]
    if "sharing" in cases:
        case = cases["sharing"]
        lines += [SHARING.format(**case)]
        tokens = case["tokens"]
        rows = ([*row, f"{statistics.median(tokens[row[0]]):.0f}"] for row in _adapted(case))
        lines += table(["step", "CPU seconds", "ratio", "tokens"], rows)
        lines += [_about(case), ""]
    if "profile" in cases:
        case = cases["profile"]
        total = sum(case["seconds"].values())
        lines += [PROFILE.format(**case)]
        shares = [[name, f"{100 * own / total:.0f} %"] for name, own in case["seconds"].items()]
        lines += table(["kind of work", "share of CPU time"], shares)
        lines += [_about(case), ""]
    return lines


def _rows(case: Mapping[str, Any]) -> list[list[str]]:
    seconds, peaks = case["cpu_seconds"], case.get("peak_gb", {})
    return [
        [name, f"{statistics.median(own):.2f}", _ratio(own, seconds[REFERENCE]),
         f"{peaks[name]:.2f}" if name in peaks else "-"]
        for name, own in seconds.items()
    ]  # fmt: skip


def _adapted(case: Mapping[str, Any], measure: str = "cpu_seconds") -> list[list[str]]:
    seconds = case[measure]
    what = [name.partition(", ")[0] for name in seconds]
    references = dict(reversed(list(zip(what, seconds, strict=True))))
    return [
        [name, f"{statistics.median(own):.3g}", _ratio(own, seconds[references[kind]])]
        for kind, (name, own) in zip(what, seconds.items(), strict=True)
    ]


def _ratio(own: Sequence[float], other: Sequence[float]) -> str:
    if len(own) == 1:
        return f"{own[0] / other[0]:.2f}"
    found = summarise(list(own), list(other))
    return f"{found['median']:.2f} ({found['q25']:.2f}-{found['q75']:.2f})"


def _about(case: Mapping[str, Any]) -> str:
    date, load, capability = (case.get(key) for key in ("date", "load_average", "capability"))
    rounds = f"{case['rounds']} round{'s' * (case['rounds'] > 1)}"
    return (
        f"{rounds}, torch {case['torch']}, torch threads: {case['threads']}"
        + (f"; {capability}" if capability else "")
        + (f"; {date}" if date else "")
        + (f"; load {load:.1f}" if load is not None else "")
        + "."
    )
