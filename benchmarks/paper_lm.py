"""The section of docs/paper.md about SmolLM2, from the raw results of `paper.py lm`."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_tables import Result, by_task, difference, interval, read, results_of, rows

__all__ = ["lm_section"]

STARTS = {
    "shared": "one shared LoRA",
    "shared-matched": "one shared LoRA of rank 32",
    "twins": "published: logits within .001",
    "spread": "logits within 3",
    "spread-alike": "logits within 3, all A equal",
    "grouped": "a skill for each group of tasks, all A equal",
}
"""The rows of the tables, by name of the start."""
WAYS = {
    "zero-shot": "zero-shot",
    "mu": "mu",
    "mu-nearest": "mu from the nearest routes",
    "random": "a fresh LoRA instead",
}
"""How starts are used on the development tasks, by the beginnings of the files' names."""
REFERENCE = "shared"


def lm_section(folder: Path) -> str:
    """How skills come to differ, and what comes of it; empty before anything was measured.

    Args:
        folder: the raw results of the study.
    """
    trainings = {name: read(folder, f"train-apart-{name}") for name in STARTS}
    found = {name: training for name, training in trainings.items() if training}
    if not found:
        return ""
    first = next(iter(found.values()))
    steps, batch = first["training"]["steps"], first["training"]["batch_size"]
    return f"""
## SmolLM2: how skills come to differ

SmolLM2-135M-Instruct with its chat template, the {first["tasks"]} training tasks with choices, rank
4, 8 skills and heads, {steps} steps of {batch} examples, the same batches for all, one seed.
Skills that start alike with routes that start uniform get the same gradient. The table shows how
far ways of starting have come from that, and the loss on training examples of the last third of
the steps. The entropy is that of the mixtures as a share of the uniform mixture's, the cosine that
between the B of two skills, both at the end.

{_trainings(found)}

The {_tasks(folder, found)} development tasks, which no inventory has learned, with 32 shots and 16
steps of 8 for phase mu, one draw. Scores are means over tasks, by the sum of an answer's
log-probabilities and by their mean per token.

{_scores(folder, list(found))}
"""


def _trainings(found: dict[str, dict[str, Any]]) -> str:
    text = [["start", "loss of the last third", "entropy of mixtures", "cosine of skills"]]
    for name, training in found.items():
        logged = [entry for entry in training["log"] if "loss" in entry]
        last = [e["loss"] for e in logged if e["step"] > training["training"]["steps"] * 2 / 3]
        ends = [logged[-1].get(key) for key in ("route_entropy", "skill_cosine")]
        shown = ["" if value is None else f"{value:.3f}" for value in ends]
        text.append([STARTS[name], f"{statistics.fmean(last):.3f}", *shown])
    return rows(text)


def _tasks(folder: Path, found: dict[str, Any]) -> int:
    return max(len(by_task(results_of(folder, [f"develop-zero-shot-{name}"]))) for name in found)


def _scores(folder: Path, names: Sequence[str]) -> str:
    text = [["start", "used", "sum", "per token", "per token, minus shared"]]
    base = results_of(folder, ["develop-zero-shot-base"])
    shared = {way: _of_start(folder, way, REFERENCE) for way in WAYS}
    shared["mu-nearest"] = shared["random"] = shared["mu"]
    entries = [("the base model as it is", "zero-shot", base)]
    entries += [(STARTS[name], way, _of_start(folder, way, name)) for way in WAYS for name in names]
    for title, way, results in entries:
        if not results:
            continue
        each = (results, _per_token(results))
        cells = [str(interval(list(by_task(scores).values()))) for scores in each]
        is_reference = results == shared[way] or not shared[way]
        gap = "" if is_reference else difference(each[1], _per_token(shared[way])).signed
        text.append([title, WAYS[way], *cells, gap])
    return rows(text)


def _of_start(folder: Path, way: str, name: str) -> Sequence[Result]:
    return results_of(folder, [f"develop-{way}-{name}"])


def _per_token(results: Sequence[Result]) -> list[Result]:
    """Results whose score is the one per token."""
    return [{**result, "score": result["score_normalised"]} for result in results]
