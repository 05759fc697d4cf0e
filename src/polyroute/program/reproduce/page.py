"""Results of a preset as a page in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from polyroute.program.reproduce.preset import Preset

__all__ = ["page_of"]


def page_of(content: Mapping[str, Any], preset: Preset) -> str:
    """The results as Markdown."""
    columns = (preset.reference or {}).get("columns", [])
    choice = content["selection"]
    tuned = ", ".join(f"{key}={value}" for key, value in content["settings"].items())
    lines = [
        f"# {content['preset']}: {preset.about}",
        "",
        f"Base model: {content['model']}. Data: {content['data']}. Selection: **{choice}**. "
        f"{preset.selection[choice]['says']}",
        *([f"Set by hand: {tuned}."] if tuned else []),
        "",
        "Scores in percent: the median over seeds of each task, then the mean over tasks.",
        "",
        _line(
            "method", "phase", "score", "std over tasks (of the medians)",
            "std over seeds (mean of the tasks)", "trained parameters", "diverged",
            *(f"published: {column}" for column in columns),
        ),
        _line(*["---"] * (7 + len(columns))),
    ]  # fmt: skip
    for way in content["results"]:
        published = way["published"] or [None] * len(columns)
        lines.append(
            _line(
                preset.methods[way["method"]]["title"], way["phase"],
                *map(_percent, (way["score"], way["std_over_tasks"], way["mean_std_over_seeds"])),
                f"{way['trained_parameters']:,}", str(way["diverged"] or ""),
                *("" if number is None else f"{number:.1f}" for number in published),
            )
        )  # fmt: skip
    if content["published_source"]:
        lines += ["", f"Published numbers: {content['published_source']}."]
    lines += ["", "How this differs from the published runs:", ""]
    lines += [f"- {sentence}" for sentence in preset.says]
    lines += _by_task(content["results"], preset)
    return "\n".join(lines) + "\n"


def _by_task(ways: Sequence[Mapping[str, Any]], preset: Preset) -> list[str]:
    """A table of each way's score on each task."""
    tasks = list(dict.fromkeys(task for way in ways for task in way["tasks"]))
    names = [f"{preset.methods[way['method']]['title']}, {way['phase']}" for way in ways]
    lines = ["", "## Median over seeds, by task", "", _line("task", *names)]
    lines.append(_line(*["---"] * (1 + len(names))))
    for task in tasks:
        entries = [way["tasks"].get(task) for way in ways]
        lines.append(_line(task, *("" if e is None else _percent(e["median"]) for e in entries)))
    return lines


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
