"""The figures of docs/benchmarks.md; they tell contenders apart by shape, not by colour."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("Agg")
# Text as outlines looks the same everywhere; fixed identifiers keep an unchanged figure unchanged.
mpl.rcParams.update({"svg.hashsalt": "polyroute", "svg.fonttype": "path", "font.size": 9})

Report = dict[str, Any]
STYLES: dict[str, dict[str, Any]] = {
    "base": {"marker": "|", "color": "#555555", "markersize": 11, "markeredgewidth": 2},
    "lora": {"marker": "D", "color": "#777777", "markerfacecolor": "white"},
    "poly": {"marker": "s", "color": "#b5541c", "markerfacecolor": "white"},
    "polyroute": {"marker": "o", "color": "#12355b"},
    "merged": {"marker": "^", "color": "#3f7cac"},
    "lora as shipped": {"marker": "D", "color": "#999999"},
    "lora compiled": {"marker": "<", "color": "#777777", "markerfacecolor": "white"},
    "polyroute compiled": {"marker": "P", "color": "#12355b"},
    "polyroute graph": {"marker": "*", "color": "#12355b", "markersize": 10},
}
DESCRIPTIONS = {
    "base": "base model alone",
    "lora": "PEFT LoRA",
    "poly": "PEFT Poly",
    "merged": "polyroute, merged",
}
HATCHES = {"base": "", "lora": "...", "poly": "////", "polyroute": ""}
FILLS = {"base": "white", "lora": "#dddddd", "poly": "#ffffff", "polyroute": "#12355b"}
AXIS_LABEL = "step time relative to PEFT LoRA (median, quartiles)"


def errors(ratio: Mapping[str, float]) -> list[list[float]]:
    """Distances to the quartiles, as `errorbar` takes them."""
    middle = ratio["median"]
    return [[max(0.0, middle - ratio["q25"])], [max(0.0, ratio["q75"] - middle)]]


def dots(axes: Axes, cases: Sequence[Report]) -> None:
    """A row per case, a mark per contender."""
    names = [n for n in STYLES if any(n in c["contenders"] for c in cases) and n != "lora"]
    for name in names:
        label = DESCRIPTIONS.get(name, name)
        for row, case in enumerate(cases):
            if name not in case["contenders"]:
                continue
            ratio = case["contenders"][name]["wall_ratio"]
            axes.errorbar(
                ratio["median"],
                row,
                xerr=errors(ratio),
                label=label,
                capsize=2,
                ls="",
                **STYLES[name],
            )
            label = "_nolegend_"
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--", label="PEFT LoRA")
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(AXIS_LABEL)


def overview_cases(groups: Mapping[str, list[Report]]) -> list[Report]:
    names = ["main", "length", "rank", "checkpointing", "generate", "overhead"]
    return list({c["name"]: c for name in names for c in groups.get(name, [])}.values())


def has_overview(groups: Mapping[str, list[Report]]) -> bool:
    """Whether there is what the figure `step-time` shows."""
    return bool(overview_cases(groups))


def draw_step_time(groups: Mapping[str, list[Report]]) -> Figure | None:
    """All cases with one inventory on the CPU; a wide range needs a logarithmic axis."""
    cases = overview_cases(groups)
    if not cases:
        return None
    figure = Figure(figsize=(7.2, 1.3 + 0.22 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    dots(axes, cases)
    logarithmic(axes)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [
        t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0) if low <= t <= high
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def growth_lines(axes: Axes, case: Report, *, over: str) -> None:
    """Poly and polyroute over the number of skills (at 8 heads) or of heads (at 8 skills)."""
    index = 0 if over == "skills" else 1
    points = sorted((s for s in case["settings"] if s[1 - index] == 8), key=lambda s: s[index])
    for name in ("poly", "polyroute"):
        found = [
            (s[index], case["contenders"].get(f"{name} s{s[0]} h{s[1]}", {}).get("wall_ratio"))
            for s in points
        ]
        found = [(x, ratio) for x, ratio in found if ratio]
        axes.errorbar(
            [x for x, _ in found],
            [ratio["median"] for _, ratio in found],
            yerr=[[errors(ratio)[side][0] for _, ratio in found] for side in (0, 1)],
            label=DESCRIPTIONS.get(name, name),
            linestyle="-" if name == "polyroute" else "--",
            capsize=2,
            **STYLES[name],
        )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="PEFT LoRA")
    axes.set_xscale("log", base=2)
    axes.set_xticks([s[index] for s in points], [str(s[index]) for s in points])
    axes.minorticks_off()
    axes.grid(color="#dddddd", linewidth=0.6)


def draw_growth(groups: Mapping[str, list[Report]], group: str = "growth") -> Figure | None:
    """A column per case; skills above, heads below; one scale for each row."""
    cases = groups.get(group, [])
    if not cases:
        return None
    figure = Figure(figsize=(max(4.0, 2.3 * len(cases)), 5.0), layout="constrained")
    grid = figure.subplots(2, len(cases), sharey="row", squeeze=False)
    for column, case in enumerate(cases):
        for row, over in enumerate(("skills", "heads")):
            axes = grid[row][column]
            growth_lines(axes, case, over=over)
            other = "8 heads" if over == "skills" else "8 skills"
            axes.set_xlabel(f"number of {over} ({other})")
        title = case["name"].replace("growth-", "").replace("-adamw", "\n+ AdamW")
        grid[0][column].set_title(title)
    for row in range(2):
        grid[row][0].set_ylabel("step time / PEFT LoRA")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def memory_cases(groups: Mapping[str, list[Report]]) -> list[Report]:
    chosen = groups.get("main", []) + [
        case for case in groups.get("checkpointing", []) if case["checkpointing"]
    ]
    return [case for case in chosen if case["contenders"]["base"].get("peak_mb")]


def has_peaks(groups: Mapping[str, list[Report]]) -> bool:
    """Whether there is what the figure `memory` shows."""
    return bool(memory_cases(groups))


def draw_memory(groups: Mapping[str, list[Report]]) -> Figure | None:
    """Peak memory of a training step, as bars beside each other."""
    cases = memory_cases(groups)
    if not cases:
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(FILLS):
        rows = [
            (i + 0.2 * (place - 1.5), c["contenders"][name]["peak_mb"])
            for i, c in enumerate(cases)
            if name in c["contenders"]
        ]
        axes.bar(
            [x for x, _ in rows],
            [y for _, y in rows],
            width=0.2,
            color=FILLS[name],
            edgecolor="black",
            linewidth=0.6,
            hatch=HATCHES[name],
            label=DESCRIPTIONS.get(name, name),
        )
    names = [case["name"] for case in cases]
    axes.set_xticks(range(len(cases)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel("peak memory of a step (MB)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def draw_gpu(groups: Mapping[str, list[Report]]) -> Figure | None:
    cases = groups.get("gpu", [])
    if not cases:
        return None
    figure = Figure(figsize=(7.2, 1.6 + 0.32 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    dots(axes, cases)
    logarithmic(axes)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


FIGURES = {
    "step-time": draw_step_time,
    "growth": draw_growth,
    "growth-gpu": partial(draw_growth, group="growth-gpu"),
    "memory": draw_memory,
    "gpu": draw_gpu,
}


def digest(groups: Mapping[str, list[Report]]) -> str:
    """Tells results apart; a figure carries that of the results it was drawn from."""
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16]


def draw_all(groups: Mapping[str, list[Report]], folder: Path, suffix: str = "svg") -> None:
    """Draw every figure that there are results for, and remove those that there are none for."""
    for name, draw in FIGURES.items():
        path = folder / f"{name}.{suffix}"
        path.unlink(missing_ok=True)
        figure = draw(groups)
        if figure is not None:
            metadata: dict[str, str | None] = {"Description": f"results {digest(groups)}"}
            if suffix == "svg":
                metadata["Date"] = None  # the same results give the same file
            figure.savefig(path, dpi=110, metadata=metadata, facecolor="white")
