"""The section of docs/paper.md about SmolLM2, from the raw results of `paper.py lm`."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from paper_lm_held_out import held_out
from paper_lm_scores import (
    BASE,
    CONTENDER_TITLES,
    REFERENCE,
    REFERENCES,
    WAYS,
    cells,
    of_seeds,
    per_token,
    reference,
    stage,
)
from paper_tables import Result, by_task, read, results_of, rows

__all__ = ["lm_section"]

START_TITLES = {
    "shared": "one shared LoRA",
    "shared-matched": "one shared LoRA of rank 32",
    "twins": "published: logits within .001",
    "spread": "logits within 3",
    "spread-alike": "logits within 3, all A equal",
    "grouped": "a skill for each group of tasks, all A equal",
}
"""The rows of the tables, by name of the start."""
BY_TEXTS = """. Routes by texts are the mean of the training tasks' routes, in which a task whose
prompts have the cosine c to those of the new one (the mean all-MiniLM-L6-v2 embeddings of 32) has
the share softmax(c / 0.1); no answer is seen"""
GROUPED = "grouped"
OTHER_READERS = "Other new readers, on whom nothing was chosen"
NEW_READERS = """
New readers whose interests no inventory has seen, with 32 examples and 16 steps of 8; rates were
chosen here:

"""


def lm_section(folder: Path) -> str:
    """How skills come to differ, and what comes of it; empty before anything was measured.

    Args:
        folder: the raw results of the study.
    """
    trainings = {name: read(folder, f"train-apart-{name}") for name in START_TITLES}
    found = {name: training for name, training in trainings.items() if training}
    if not found:
        return ""
    first = next(iter(found.values()))
    steps, batch = first["training"]["steps"], first["training"]["batch_size"]
    return f"""
## SmolLM2: how skills come to differ

SmolLM2-135M-Instruct with its chat template, the {first["tasks"]} training tasks with choices, rank
4, 8 skills and heads, {steps} steps of {batch} examples, the same batches for all, one seed. (The
gradients that groups are made of cost as much as 92 steps more, which were not subtracted here.)
Skills that start alike with routes that start uniform get the same gradient. The table shows how
far ways of starting have come from that, and the loss on training examples of the last third of
the steps. The entropy is that of the mixtures as a share of the uniform mixture's, the cosine that
between the B of two skills, both at the end.

{_trainings(found, START_TITLES)}

The {_tasks(folder, found)} development tasks, which no inventory has learned, with 32 shots and 16
steps of 8 for phase mu, one draw. Scores are means over tasks, by the sum of an answer's
log-probabilities and by their mean per token.

{_scores(folder, list(found))}
{_developed(folder)}{_unsaid(folder / "unsaid")}{_readers(folder / "readers")}
{held_out(folder)}{_developed(folder, "short-")}"""


def _trainings(found: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """What training shows: its loss on the last third of the steps, and the routes at the end."""
    text = [["inventory", "loss of the last third", "entropy of mixtures", "cosine of skills"]]
    for name, training in found.items():
        logged = [entry for entry in training["log"] if "loss" in entry]
        last = [e["loss"] for e in logged if e["step"] > training["training"]["steps"] * 2 / 3]
        ends = [logged[-1].get(key) for key in ("route_entropy", "skill_cosine")]
        shown = ["" if value is None else f"{value:.3f}" for value in ends]
        text.append([names[name], f"{statistics.fmean(last):.3f}", *shown])
    return rows(text)


def _tasks(folder: Path, found: dict[str, Any]) -> int:
    return max(len(by_task(results_of(folder, [f"apart-zero-shot-{name}"]))) for name in found)


def _scores(folder: Path, names: Sequence[str]) -> str:
    text = [["start", "used", "sum", "per token", "per token, minus shared"]]
    shared = {way: results_of(folder, [f"apart-{way}-{REFERENCE}"]) for way in WAYS}
    entries = [(BASE, "zero-shot", "base")]
    entries += [(START_TITLES[name], way, name) for way in WAYS for name in names]
    for title, way, name in entries:
        results = results_of(folder, [f"apart-{way}-{name}"])
        if results:
            text.append([title, WAYS[way], *cells(results, [reference(shared, way)])])
    return rows(text)


def _developed(folder: Path, prefix: str = "") -> str:
    """The main runs before the held-out tasks: training, their own tasks, the development tasks.

    Args:
        folder: the raw results of the study.
        prefix: of the stages' names.
    """
    trainings = _trained(folder, prefix)
    if not {REFERENCE, GROUPED} <= set(trainings):
        return ""
    shared, grouped = (trainings[name]["training"] for name in (REFERENCE, GROUPED))
    title = "the main runs" if not prefix else "shorter runs"
    return f"""
## SmolLM2: {title}

These train for {shared["steps"]} steps of {shared["batch_size"]}, in
{trainings[REFERENCE]["dtype"]}. One that starts in groups trains for
{shared["steps"] - grouped["steps"]} steps less, which is what the gradients of its examples cost.

{_trainings(trainings, CONTENDER_TITLES)}
{_moving(trainings)}{_own_tasks(folder, prefix)}
The development tasks, with 32 shots and 16 steps of 8, unless the table says otherwise. Rates in
adapting were chosen here, by the score per token, with the
inventories of seed 0{"" if prefix else BY_TEXTS}:

{_rates(folder, prefix)}
"""


def _trained(folder: Path, prefix: str = "") -> dict[str, Any]:
    """The contenders of the main runs that were trained from seed 0."""
    found = {name: read(folder, f"{prefix}train-{name}-s0") for name in CONTENDER_TITLES}
    return {name: training for name, training in found.items() if training}


def _own_tasks(folder: Path, prefix: str = "") -> str:
    """The tasks that inventories learned, each with its own routes; empty if nothing was scored."""
    scores = {name: of_seeds(folder, f"{prefix}own-tasks-{name}") for name in CONTENDER_TITLES}
    if not any(scores.values()):
        return ""
    references = [name for name in REFERENCES if scores[name]]
    gaps = [f"per token, minus {CONTENDER_TITLES[name]}" for name in references]
    text = [["inventory", "sum", "per token", *gaps, "seeds"]]
    base = results_of(folder, [f"{prefix}own-tasks-base"])
    entries: list[tuple[str, Sequence[Result]]] = [(BASE, base)]
    entries += [(CONTENDER_TITLES[name], own) for name, own in scores.items()]
    for title, own in entries:
        if own:
            seeds = {result["seed"] for result in own if "seed" in result}
            shown = cells(own, [scores[name] for name in references])
            text.append([title, *shown, str(len(seeds) or "")])
    return f"""
The test examples of the training tasks themselves, each with its own routes:

{rows(text)}
"""


def _unsaid(folder: Path) -> str:
    """The same training tasks without their instructions; empty before anything was measured."""
    own = _own_tasks(folder)
    if not own:
        return ""
    return f"""
## SmolLM2: when the prompt does not say what the task is

The main runs again, with the instructions left out of every prompt, in training and in testing.
Only the input, and the choices that are compared, tell tasks apart then; one shared LoRA cannot
know more.

{_trainings(_trained(folder), CONTENDER_TITLES)}
{own}"""


def _readers(folder: Path) -> str:
    """Users who want other things of the same texts; empty before anything was measured."""
    own, rates = _own_tasks(folder), _rates(folder, "")
    if not own:
        return ""
    chosen = f"{NEW_READERS}{rates}\n" if "\n|" in rates.partition("\n")[2] else ""
    return f"""
## SmolLM2: readers who want other things of the same texts

Each task is a reader, who is interested in half of the topics of one data set, at random: 10
domains of requests to an assistant, 7 intents of voice commands, or 8 acts in a dialogue. The
prompt is a request and nothing else, and the answer says whether it is for this reader. Texts and
topics are real, interests are drawn. 48 readers are learned from the same texts, to which they give
contradicting answers.

{_trainings(_trained(folder), CONTENDER_TITLES)}
{own}{_named(folder / "named")}{chosen}{held_out(folder, OTHER_READERS)}"""


def _named(folder: Path) -> str:
    """The same readers with their names in the prompt; empty before anything was measured."""
    own = _own_tasks(folder)
    if not own:
        return ""
    return f"""
The same with the name of the reader in every prompt, as an instruction (`Is this for clinc_domain
reader 07?`), which is the other way to tell a model who reads:
{own}"""


def _rates(folder: Path, prefix: str) -> str:
    """The rates that contenders tried on the development tasks, and routes that need no tuning."""
    role = f"{prefix}develop"
    found = {
        (way, name): _by_rate(results_of(folder, [f"{stage(role, way)}-{name}-s0"]))
        for way, name in product(WAYS, CONTENDER_TITLES)
    }
    shared = {way: max(found[way, REFERENCE].values(), key=_total, default=[]) for way in WAYS}
    base = _by_rate(results_of(folder, ["develop-zero-shot-base"]))
    entries = [(BASE, "zero-shot", base)]
    entries += [(CONTENDER_TITLES[name], way, own) for (way, name), own in found.items()]
    head = ["inventory", "used", "rate", "sum", "per token", "per token, minus shared"]
    text = [[*head, "draws of examples"]]
    for title, way, own in entries:
        for rate, results in own.items():
            draws = len({result["seed"] for result in results if "seed" in result})
            shown = cells(results, [reference(shared, way)])
            text.append([title, WAYS[way], rate, *shown, str(draws or "")])
    return rows(text)


def _moving(trainings: Mapping[str, Mapping[str, Any]]) -> str:
    """The entropy of the mixtures over the steps of the inventories with routes."""
    shares = (0.1, 0.25, 0.5, 0.75, 1)
    text = [["entropy of mixtures, by share of the steps", *(f"{share:.0%}" for share in shares)]]
    for name, training in trainings.items():
        steps = training["training"]["steps"]
        logged = {e["step"]: e["route_entropy"] for e in training["log"] if "route_entropy" in e}
        if logged:
            nearest = [min(logged, key=lambda step: abs(step - s * steps)) for s in shares]
            text.append([CONTENDER_TITLES[name], *(f"{logged[step]:.3f}" for step in nearest)])
    return f"\n{rows(text)}\n" if len(text) > 1 else ""


def _by_rate(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by the rate that they are labelled with; what is not adapted has none."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.get("label", ""), []).append(result)
    return dict(sorted(found.items()))


def _total(results: Iterable[Result]) -> float:
    return sum(by_task(per_token(results)).values())
