"""Sections of docs/benchmarks.md on libraries of LoRAs, and the table of docs/library.md."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paper_tables import Interval, interval, read

from polyroute.judging import BASE, FRESH, RANDOM, Judgement

__all__ = ["library_lines", "way_lines"]

Table = Callable[..., list[str]]
Scores = Mapping[str, Sequence[float]]
CONTROLS = 3
"""Random libraries that one judgement compares with."""
BY_USE = {
    "average": "the mean of all LoRAs",
    "best single": "the LoRA that fits the examples best",
    "weights": "learned weights, one for each LoRA",
    "weights of layers": "learned weights, one for each LoRA and layer",
    "arrow": "Arrow",
    "spectr": "SpectR",
}


WAYS = (
    ("average", "average: the task `mu`, `merge(\"mean\")`", "nothing", "many alike LoRAs"),
    ("best single", "best single: `rank_skills(...).top(1)`", "nothing; a backward on the examples",
     "one LoRA is of nearly the same task"),
    ("weights", "weights: `learn_weights`", "a number for each LoRA", "a few examples"),
    ("weights of layers", "weights of layers: `learn_weights`, `finegrained`",
     "a number for each LoRA and layer", "more examples"),
    ("arrow", "`Arrow`", "nothing", "no examples, inputs of several tasks"),
    ("spectr", "`SpectR`", "nothing", "the same"),
    (FRESH, "a fresh LoRA: `adapt --phase random`", "a whole LoRA", "what a library has to beat"),
)  # fmt: skip
"""Contender, call, what is trained, and when to use it."""
FREEZE = ("frozen Arrow: `freeze`", "a LoRA, in closed form, on texts", "servers know only LoRAs")
MERGED = "a merge: `merge`"
ROUTED_OF = "32"
"""The number of LoRAs for which the time of routes is given."""


def way_lines(results: Path, table: Table) -> list[str]:
    """What there is, what it costs and what it gave, as Markdown."""
    judged, frozen, timed, merged = (
        read(results, stage) or {}
        for stage in ("library_judge", "library_frozen", "token_routes", "library_merging")
    )
    seconds = {name: one["cpu_s"] for name, one in timed["loras"][ROUTED_OF]["summary"].items()}

    def cost(name: str) -> str:
        return f"{seconds[name if name in seconds else 'one'] / seconds['base'] - 1:.0%}"

    of_task: dict[str, Scores] = {
        task: one["scores"] for task, one in judged.get("found", {}).items()
    }
    rows = []
    for name, call, trained, when in WAYS if of_task else ():
        gaps = [
            _of_tasks({t: np.subtract(s[name], s[other]) for t, s in of_task.items()}).signed
            if name != other
            else ""
            for other in (BASE, FRESH)
        ]
        rows.append([call, trained, when, cost(name), *gaps])
    if found := frozen.get("found"):
        *_, gap = _frozen_scores(found)
        count = frozen["how"]["count"]
        rows.append([*FREEZE, cost("one"), "", f"{gap.signed} to Arrow, of {count} LoRAs"])
    own = [r["score"] for r in merged["merges"]["individual"]["results"]]
    kept = {
        name: statistics.fmean(r["score"] for r in one["results"]) / statistics.fmean(own)
        for name, one in merged["merges"].items()
        if name != "individual"
    }
    best = max(kept, key=lambda name: kept[name])
    said = (
        f"keeps {min(kept.values()):.0%} to {kept[best]:.0%} (`{best}`) of what the LoRAs score "
        "on their own tasks"
    )
    rows.append([MERGED, "nothing", "one LoRA for the library's own tasks", cost("one"), "", said])
    head = ["way", "what is trained", "when", "time", "score minus base", "minus fresh LoRA"]
    return table(head, rows)


def library_lines(results: Path, table: Table) -> list[str]:
    """All that was measured, as Markdown."""
    sections = {
        "judge": _judge, "draws": _draws, "zero": _zero, "shares": _shares,
        "frozen": _frozen, "compiled": _compiled,
    }  # fmt: skip
    lines: list[str] = []
    for name, make in sections.items():
        content = read(results, f"library_{name}") or {}
        if content.get("found"):
            lines += make(content["found"], content["how"], table)
    return lines


def _judge(found: Mapping[str, Any], how: Mapping[str, Any], table: Table) -> list[str]:
    of_task: dict[str, Scores] = {task: one["scores"] for task, one in found.items()}

    def gap(name: str, other: str) -> str:
        return _of_tasks({t: np.subtract(s[name], s[other]) for t, s in of_task.items()}).signed

    rows = []
    for name in (BASE, FRESH, *BY_USE):
        control = f"{RANDOM}{name} 1"
        has = control in next(iter(of_task.values()))
        rows.append(
            [
                BY_USE.get(name, name),
                str(_of_tasks({task: own[name] for task, own in of_task.items()})),
                "" if name == BASE else gap(name, BASE),
                "" if name in (BASE, FRESH) else gap(name, FRESH),
                gap(name, control) if has else "",
            ]
        )
    pooled = Judgement(
        {
            name: np.concatenate([own[name] for own in of_task.values()])
            for name in next(iter(of_task.values()))
        },
        "example",
    )
    examples = len(next(iter(pooled.scores.values())))
    head = ["use", "score per token", "minus base", "minus fresh LoRA", "minus a random library"]
    return [
        "## Does a library help with new tasks?",
        "",
        f"{how['count']} LoRAs of SmolLM2 (rank 4, all linear layers), one for each training task "
        f"of [the study on SmolLM2](paper.md), and {len(of_task)} tasks that none of them learned, "
        f"with 32 examples each; {examples} test examples. A fresh LoRA and learned weights take "
        "16 steps of 8. The random library has the same ranks and norms. Means over tasks, with 95 "
        f"% intervals over tasks. The judge's verdict over all examples: {pooled.verdict}. "
        "`python benchmarks/library_study.py judge` measures it.",
        "",
        *table(head, rows),
    ]


def _draws(found: Mapping[str, Any], how: Mapping[str, Any], table: Table) -> list[str]:
    rows = []
    for task, one in found.items():
        scores = {name: np.array(own) for name, own in one["scores"].items()}
        count = max(int(name.rpartition(" ")[2]) for name in scores if name.startswith(RANDOM))
        judged = count - CONTROLS
        yes = sum(bool(_as_library(scores, draw).helping) for draw in range(1, judged + 1))
        real = Judgement(_with_controls(scores, {use: use for use in BY_USE}, 0), "example")
        rows.append(
            [
                f"`{task}`", str(len(scores[BASE])), f"{yes} of {judged}",
                "yes" if real.helping else "no", real.verdict,
            ]
        )  # fmt: skip
    return [
        "### Random libraries",
        "",
        "Random libraries are judged as if they were real, each with the three that follow it as "
        "controls, and so is the library of `inventories/smollm2/loras`, which has a LoRA for the "
        "first of these tasks. `python benchmarks/library_study.py draws` measures it.",
        "",
        *table(
            ["task", "test examples", "random libraries that help", "the library", "its verdict"],
            rows,
        ),
    ]


def _as_library(scores: Mapping[str, Any], draw: int) -> Judgement:
    """A random library as the one that is judged."""
    uses = {use: f"{RANDOM}{use} {draw}" for use in BY_USE}
    return Judgement(_with_controls(scores, uses, draw), "example")


def _with_controls(scores: Mapping[str, Any], uses: Mapping[str, str], draw: int) -> dict[str, Any]:
    """The scores of one library, by where each use is, and of the random ones that follow it."""
    found = {name: scores[name] for name in (BASE, FRESH)}
    for use, place in uses.items():
        found[use] = scores[place]
        for control in range(1, CONTROLS + 1):
            found[f"{RANDOM}{use} {control}"] = scores[f"{RANDOM}{use} {draw + control}"]
    return found


def _zero(found: Mapping[str, Any], how: Mapping[str, Any], table: Table) -> list[str]:
    scores = {
        name: [one[name]["score_normalised"] for one in found.values()]
        for name in next(iter(found.values()))
    }

    def gap(name: str, other: str) -> str:
        return (
            ""
            if name == other
            else interval([a - b for a, b in zip(scores[name], scores[other], strict=True)]).signed
        )

    names = {BASE: "the base model", "MHR": "MHR: the average of its skills", **BY_USE}
    rows = []
    for name, own in scores.items():
        control = f"{RANDOM}{name}"
        shown = names.get(name) or f"a random library: {names[name.removeprefix(RANDOM)]}"
        against = gap(name, control) if control in scores else ""
        rows.append([shown, str(interval(own)), gap(name, BASE), gap(name, "MHR"), against])
    head = ["used", "score per token", "minus base", "minus MHR", "minus a random library"]
    return [
        "### New tasks without an example",
        "",
        f"The same {how['count']} LoRAs, on {len(found)} held-out tasks, up to {how['test']} test "
        "examples of each; MHR was trained on the same tasks with the same budget. Nothing was "
        "chosen on these tasks. `python benchmarks/library_study.py zero` measures it.",
        "",
        *table(head, rows),
    ]


def _shares(found: Mapping[str, Any], how: Mapping[str, Any], table: Table) -> list[str]:
    rows = []
    for rule in next(iter(found.values())):
        by_task = [list(own[rule].values()) for own in found.values()]
        blocks = np.array(by_task).mean(0)
        rows.append(
            [
                rule, str(interval([float(np.mean(own)) for own in by_task])),
                f"{blocks.min():.3f}", f"{statistics.median(blocks):.3f}", f"{blocks.max():.3f}",
            ]
        )  # fmt: skip
    head = ["route", "share", "least block", "median block", "most block"]
    return [
        "### Do tokens find the LoRA of their task?",
        "",
        f"The share of the tokens of a task's prompts that choose the task's own LoRA, among "
        f"{how['count']}; by chance it would be {1 / how['count']:.3f}. "
        "`python benchmarks/library_study.py shares` measures it.",
        "",
        *table(head, rows),
    ]


def _frozen(found: Mapping[str, Any], how: Mapping[str, Any], table: Table) -> list[str]:
    live, still, gap = _frozen_scores(found)
    missed = [one["error"] for one in found.values()]
    head = ["", "Arrow", "frozen", "difference", "share of the update that is missed"]
    row = ["per token", str(live), str(still), gap.signed,
           str(interval(missed))]  # fmt: skip
    return [
        "### One plain LoRA in place of Arrow",
        "",
        f"For each of {len(found)} tasks that no LoRA learned, `pr.freeze` fits a LoRA of rank "
        f"{how['rank']} to Arrow over a library of {how['count']} on {how['texts']} prompts. "
        "`python benchmarks/library_study.py frozen` measures it.",
        "",
        *table(head, [row]),
    ]


def _frozen_scores(found: Mapping[str, Any]) -> tuple[Interval, Interval, Interval]:
    """Per token: those of the live route, of the LoRA in its place, and the difference."""
    live, still = (
        [one[name]["score_normalised"] for one in found.values()] for name in ("arrow", "frozen")
    )
    gaps = [b - a for a, b in zip(live, still, strict=True)]
    return interval(live), interval(still), interval(gaps)


def _compiled(found: Mapping[str, Any], how: Mapping[str, Any], table: Table) -> list[str]:
    rows = []
    for skills, one in found.items():
        lost = "" if "errors" not in one else str(interval(list(one["errors"].values())))
        rows.append([skills, lost, one.get("refused", "")])
    return [
        "### Few skills in place of many LoRAs",
        "",
        f"What `pr.compile_library` loses of the norm of each LoRA, where {how['count']} LoRAs "
        "become an inventory of few skills. "
        "`python benchmarks/library_study.py compiled` measures it.",
        "",
        *table(["skills", "share that is lost", "refused"], rows),
    ]


def _of_tasks(by_task: Mapping[str, Any]) -> Interval:
    return interval([float(np.mean(own)) for own in by_task.values()])
