"""The section of docs/paper.md about SmolLM2, from the raw results of `paper.py lm`."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import product
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
    "mu-longer": "mu for half as many steps more",
    "mu-nearest": "mu from the nearest routes",
    "z": "z",
    "full": "full",
    "random": "a fresh LoRA instead",
}
"""How inventories are used, by the beginnings of the files' names."""
REFERENCE = "shared"
GROUPED = "grouped"
REFERENCES = (REFERENCE, "shared-matched")
"""What the contenders of the main runs are compared with."""
CONTENDERS = {
    "shared": "one shared LoRA",
    "shared-matched": "one shared LoRA of rank 32",
    "poly": "Poly",
    "mhr": "MHR",
    "grouped": "MHR, a skill for each group of tasks",
}
"""The rows of the tables of the main runs."""
SEEDS = range(9)
"""Of training; those that ran are found by their files."""


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
{_developed(folder)}{_held_out(folder)}"""


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
    return max(len(by_task(results_of(folder, [f"apart-zero-shot-{name}"]))) for name in found)


def _scores(folder: Path, names: Sequence[str]) -> str:
    text = [["start", "used", "sum", "per token", "per token, minus shared"]]
    base = results_of(folder, ["apart-zero-shot-base"])
    shared = {way: _of_start(folder, way, REFERENCE) for way in WAYS}
    shared["mu-nearest"] = shared["random"] = shared["mu"]
    entries = [("the base model as it is", "zero-shot", base)]
    entries += [(STARTS[name], way, _of_start(folder, way, name)) for way in WAYS for name in names]
    for title, way, results in entries:
        if results:
            text.append([title, WAYS[way], *_cells(results, [shared[way]])])
    return rows(text)


def _cells(results: Sequence[Result], references: Iterable[Sequence[Result]]) -> list[str]:
    """Both scores, and the differences per token to references; empty to itself and to nothing."""
    own = _per_token(results)
    gaps = [
        "" if results == other or not other else difference(own, _per_token(other)).signed
        for other in references
    ]
    return [_score(results), _score(own), *gaps]


def _of_start(folder: Path, way: str, name: str) -> Sequence[Result]:
    return results_of(folder, [f"apart-{way}-{name}"])


def _per_token(results: Iterable[Result]) -> list[Result]:
    """Results whose score is the one per token."""
    return [{**result, "score": result["score_normalised"]} for result in results]


def _developed(folder: Path) -> str:
    """The rates that contenders tried on the development tasks; empty before that."""
    found = [("the base model as it is", "zero-shot", "zero-shot-base")]
    for way, name in product(WAYS, CONTENDERS):
        cell = way if way == "zero-shot" else f"{way}-32"
        found.append((CONTENDERS[name], way, f"{cell}-{name}-s0"))
    by_rate = {stage: _by_rate(results_of(folder, [f"develop-{stage}"])) for *_, stage in found}
    trainings = {name: read(folder, f"train-{name}-s0") for name in (REFERENCE, GROUPED)}
    if not all(trainings.values()):
        return ""
    untuned, tuned = (
        max(by_rate[f"{cell}-{REFERENCE}-s0"].values(), key=_total, default=[])
        for cell in ("zero-shot", "mu-32")
    )
    text = [["inventory", "used", "rate", "sum", "per token", "per token, minus shared"]]
    for title, way, stage in found:
        best = untuned if way == "zero-shot" else tuned
        for rate, results in by_rate[stage].items():
            text.append([title, WAYS[way], rate, *_cells(results, [best])])
    shared, grouped = (trainings[name]["training"] for name in (REFERENCE, GROUPED))
    return f"""
The main runs train for {shared["steps"]} steps of {shared["batch_size"]}, in
{trainings[REFERENCE]["dtype"]}. One that starts in groups trains for
{shared["steps"] - grouped["steps"]} steps less, which is what the gradients of its examples cost.
Rates in adapting were chosen on the development tasks with seed 0, by the score per token:

{rows(text)}
"""


def _by_rate(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by the rate that they are labelled with; what is not adapted has none."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.get("label", ""), []).append(result)
    return dict(sorted(found.items()))


def _total(results: Iterable[Result]) -> float:
    return sum(by_task(_per_token(results)).values())


def _held_out(folder: Path) -> str:
    """The held-out tasks, on which no setting was chosen; empty before they were scored."""
    base = results_of(folder, ["test-zero-shot-base"])
    text = ""
    for shots, title in (
        (0, "Without an example"),
        (32, "With 32 examples"),
        (8, "With 8 examples"),
    ):
        entries = [("the base model as it is", "zero-shot", base)]
        entries += [
            (CONTENDERS[name], f"{WAYS[way]}{shown}", _of_seeds(folder, f"{stage}-{name}", end))
            for way, stage, end, shown in _stages(shots)
            for name in CONTENDERS
        ]
        if any(results for *_, results in entries[1:]):
            text += f"\n{title}:\n\n{_compared(folder, entries, shots)}\n"
    return f"\n## SmolLM2: held-out tasks\n{text}" if text else ""


def _stages(shots: int) -> list[tuple[str, str, str, str]]:
    """Ways of using inventories: a key of WAYS, how files begin and end, and what is added."""
    if not shots:
        way = "zero-shot"
        continued = ("-continued", ", after more training of the average")
        return [(way, f"test-{way}", *more) for more in (("", ""), continued)]
    return [(way, f"test-{way}-{shots}", "", "") for way in WAYS]


def _compared(
    folder: Path, entries: Sequence[tuple[str, str, Sequence[Result]]], shots: int
) -> str:
    """Scores, and differences to shared LoRAs with as many examples."""
    way = f"mu-{shots}" if shots else "zero-shot"
    references = [_of_seeds(folder, f"test-{way}-{name}") for name in REFERENCES]
    head = ["inventory", "used", "sum", "per token"]
    head += [f"per token, minus {CONTENDERS[name]}" for name in REFERENCES]
    text = [[*head, "seeds"]]
    for title, used, results in entries:
        if results:
            seeds = {result["seed"] for result in results if "seed" in result}
            text.append([title, used, *_cells(results, references), str(len(seeds) or "")])
    return rows(text)


def _score(results: Iterable[Result]) -> str:
    return str(interval(list(by_task(results).values())))


def _of_seeds(folder: Path, stage: str, end: str = "") -> list[dict[str, Any]]:
    """The results of every seed of training, each with that seed."""
    return [
        {**result, "seed": seed}
        for seed in SEEDS
        for result in results_of(folder, [f"{stage}-s{seed}{end}"])
    ]
