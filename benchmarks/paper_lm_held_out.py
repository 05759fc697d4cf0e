"""The held-out tasks in the section of docs/paper.md about SmolLM2."""

from collections.abc import Sequence
from pathlib import Path

from paper_lm_scores import (
    AS_THEY_ARE,
    BASE,
    CONTENDER_TITLES,
    REFERENCE,
    REFERENCES,
    WAYS,
    cells,
    of_seeds,
    reference,
    score,
    stage,
)
from paper_tables import Result, difference, results_of, rows

__all__ = ["held_out"]

WRITTEN_TITLES = {"exact_match": "exact match", "rougeL": "ROUGE-L"}
"""The metrics of tasks that ask for text."""
Entry = tuple[str, str, str, Sequence[Result]]
"""A row of a table: whose, used how, compared with which use of others, and the results."""


def held_out(folder: Path, title: str = "held-out tasks") -> str:
    """The held-out tasks, on which no setting was chosen; empty before they were scored."""
    base = results_of(folder, ["test-zero-shot-base"])
    text = ""
    for shots, examples in ((0, "Without an example"), (32, "With 32 examples"),
                            (8, "With 8 examples")):  # fmt: skip
        stages = {way: stage("test", way, shots) for way in _ways(shots)}
        entries = [(BASE, "zero-shot", "mu" if shots else "zero-shot", base)]
        entries += [
            (own, way, way, of_seeds(folder, f"{begin}-{name}"))
            for way, begin in stages.items()
            for name, own in CONTENDER_TITLES.items()
        ]
        if any(results for *_, results in entries[1:]):
            text += f"\n{examples}:\n\n{_compared(entries)}\n"
    text += _written(folder)
    return f"\n## SmolLM2: {title}\n{text}" if text else ""


def _ways(shots: int) -> Sequence[str]:
    """The ways of using an inventory with so many examples."""
    if not shots:
        return ("zero-shot", "continued", "text", "usage")
    return [way for way in WAYS if way not in AS_THEY_ARE or way == f"nearest-{shots}"]


def _written(folder: Path) -> str:
    """The held-out tasks that ask for text, by metric; empty before they were scored."""
    base = results_of(folder, ["text-zero-shot-base"])
    entries = [(BASE, "zero-shot", "zero-shot", base)]
    entries += [
        (own, way, way, of_seeds(folder, f"{stage('text', way)}-{name}"))
        for way in WAYS
        for name, own in CONTENDER_TITLES.items()
    ]
    if not any(results for *_, results in entries[1:]):
        return ""
    metrics = {result["task"]: result["metric"] for result in base}
    shared = _by_way(entries, REFERENCE)
    text = [["inventory", "used", *WRITTEN_TITLES.values(), "minus shared, over both"]]
    for title, way, against, results in entries:
        if results:
            scores = [
                score(r for r in results if metrics[r["task"]] == metric)
                for metric in WRITTEN_TITLES
            ]
            other = reference(shared, against)
            gap = "" if results == other or not other else difference(results, other).signed
            text.append([title, WAYS[way], *scores, gap])
    counts = [sum(metric == own for own in metrics.values()) for metric in WRITTEN_TITLES]
    return f"""
Tasks that ask for text, {counts[0]} with short answers and {counts[1]} with longer ones, with 32
examples unless used as they are:

{rows(text)}
"""


def _compared(entries: Sequence[Entry]) -> str:
    """Scores, and differences to shared LoRAs with as many examples."""
    head = ["inventory", "used", "sum", "per token"]
    head += [f"per token, minus {CONTENDER_TITLES[name]}" for name in REFERENCES]
    text = [[*head, "seeds"]]
    shared = {name: _by_way(entries, name) for name in REFERENCES}
    for title, way, against, results in entries:
        if results:
            seeds = {result["seed"] for result in results if "seed" in result}
            own = cells(results, [reference(shared[name], against) for name in REFERENCES])
            text.append([title, WAYS[way], *own, str(len(seeds) or "")])
    return rows(text)


def _by_way(entries: Sequence[Entry], name: str) -> dict[str, Sequence[Result]]:
    """The results of one contender."""
    return {way: results for title, way, _, results in entries if title == CONTENDER_TITLES[name]}
