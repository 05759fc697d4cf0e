"""Write docs/paper.md from benchmarks/results/paper.

    python benchmarks/paper_page.py

Nothing is measured here: the same results give the same page. `tests/test_benchmarks.py` makes sure
that the page is that of the results beside it.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_lm import lm_section
from paper_tables import (
    Interval,
    by_task,
    difference,
    interval,
    method_table,
    read,
    results_of,
    rows,
)

RESULTS = Path(__file__).parent / "results" / "paper"
PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
Results = list[dict[str, Any]]
Ways = Mapping[tuple[str, str], Results]
"""Results by inventory and phase."""

HEAD = """# The paper at our scale

Does Multi-Head adapter Routing do here what its paper says (Caccia et al., NeurIPS 2023)? Studies
on two CPU cores look into that: on real tasks with a language model, SmolLM2, which has begun; on
generated tasks that recombine known skills; and on real tasks with a frozen sentence encoder. All
contenders of a study have the same base model, tasks, batches and draws of examples, and equal
costs of training unless a section says otherwise. Intervals are 95 %, from a bootstrap over tasks;
differences are paired by task. Raw results are in `benchmarks/results/paper/`.
`python benchmarks/paper_page.py` makes this page from them;
`python benchmarks/paper.py generated`, `python benchmarks/paper.py real --data SUITE` and
`make study-lm` measure again.
"""


def generated_ways(folder: Path) -> dict[tuple[str, str], Results]:
    """The results of the generated study, over all seeds of training."""
    found: dict[tuple[str, str], Results] = {}
    for path in sorted(folder.glob("*-s[0-9].json")):
        phase, _, rest = path.stem.partition("-")
        if phase not in ("mu", "z", "full", "random", "zero", "fine"):
            continue
        if phase in ("zero", "fine"):
            phase = {"zero": "zero-shot", "fine": "fine-tuning"}[phase]
            rest = rest.partition("-")[2]
        config = rest.rpartition("-s")[0] if phase != "fine-tuning" else "base model"
        seed = int(path.stem.rpartition("-s")[2])
        for result in json.loads(path.read_text(encoding="utf-8")):
            found.setdefault((config, phase), []).append({**result, "seed": seed})
    return found


def real_ways(folder: Path, stage: str) -> dict[tuple[str, str], Results]:
    """The results of the real study on one group of tasks; a phase says the recipe too."""
    found: dict[tuple[str, str], Results] = {}
    for path in sorted(folder.glob(f"{stage}-*.json")):
        results = results_of(folder, [path.stem])
        inventory, phase = results[0]["inventory"], results[0]["phase"]
        recipe = path.stem.removeprefix(f"{stage}-{inventory}-{phase}-").replace("-", " ")
        found[inventory, f"{phase}, {recipe}"] = results
    if stage == "test":
        for path in sorted(folder.glob("zero-shot-*.json")):
            name = path.stem.removeprefix("zero-shot-")
            found[name, "zero-shot"] = results_of(folder, [path.stem])
    return found


def table(ways: Ways, reference: tuple[str, str]) -> str:
    """All ways, best first."""

    def score(way: tuple[str, str]) -> float:
        return -statistics.fmean(by_task(ways[way]).values())

    entries = [(name, phase, ways[name, phase]) for name, phase in sorted(ways, key=score)]
    return method_table(entries, ways[reference])


def answers(ways: Ways, questions: Sequence[tuple[str, tuple[str, str], tuple[str, str]]]) -> str:
    """Paired differences, as a table; what was not run is left out."""
    text = [["question", "one", "other", "difference"]]
    for question, one, other in questions:
        if one in ways and other in ways:
            gap = difference(ways[one], ways[other]).signed
            text.append([question, "/".join(one), "/".join(other), gap])
    return rows(text)


def alignment_table(folder: Path, stages: Mapping[str, Sequence[str]]) -> str:
    """Mean cosines of the gradients of training tasks, for each inventory over its runs."""
    text = [["inventory", "effective", "inventory's", "overlap of routes", "runs"]]
    for name, several in stages.items():
        found = [each for each in (read(folder, stage) for stage in several) if each]
        if not found:
            continue
        cells = [name]
        for measure in ("effective", "inventory", "overlap"):
            values = [each["mean"][measure] for each in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        text.append([*cells, str(len(found))])
    return rows(text)


def curve(ways: Ways, what: str, names: Mapping[int, str]) -> str:
    """Phase z over the number of heads or skills."""
    text = [[what, "numbers trained for a task", "accuracy", "minus full of mhr", "seeds"]]
    for count, name in sorted(names.items()):
        results = ways.get((name, "z"))
        if results:
            gap = difference(results, ways["mhr", "full"]).signed
            score: Interval = interval(list(by_task(results).values()))
            seeds = str(len({r["seed"] for r in results}))
            text.append(
                [str(count), f"{results[0]['trained_parameters']:,}", str(score), gap, seeds]
            )
    return rows(text)


MEASURED = ("shared", "shared-matched", "private", "poly", "mhr")
QUESTIONS = (
    ("MHR over Poly", ("mhr", "full"), ("poly", "full")),
    ("MHR over Poly, routes alone", ("mhr", "z"), ("poly", "z")),
    ("MHR over Poly, the average", ("mhr", "mu"), ("poly", "mu")),
    ("MHR over one shared LoRA", ("mhr", "full"), ("shared", "mu")),
    ("MHR over a LoRA with as many parameters", ("mhr", "full"), ("shared-matched", "mu")),
    ("Poly over a LoRA with as many parameters", ("poly", "full"), ("shared-matched", "mu")),
    ("routes alone against full", ("mhr", "z"), ("mhr", "full")),
    ("the average against full", ("mhr", "mu"), ("mhr", "full")),
    ("what training before gives", ("mhr", "full"), ("mhr", "random")),
    ("zero-shot: the average of MHR against shared", ("mhr", "zero-shot"), ("shared", "zero-shot")),
    ("zero-shot: more steps for the average of MHR", ("mhr-continued", "zero-shot"),
     ("mhr", "zero-shot")),
    ("zero-shot: the same against shared", ("mhr-continued", "zero-shot"),
     ("shared-continued", "zero-shot")),
)  # fmt: skip


def generated_section(folder: Path) -> str:
    """The generated study."""
    ways = generated_ways(folder)
    seeds = sorted({r["seed"] for r in ways["mhr", "z"]})
    stages = {name: [f"aligned-{name}-s{seed}" for seed in seeds] for name in MEASURED}
    return f"""
## Generated tasks

The demo's suite and base model (a T5 of 0.8 million parameters): 40 training tasks, 12 held-out
compositions of the same skills, 8 examples of each, exact answers. There are {len(seeds)} seeds
of training, each with its own draw of examples; rank 1, 8 skills, 8 heads; 250 steps of 32
examples, then 20 of 8. `shared-matched` has rank 8, so as many parameters as the inventories.
`private` in phase mu starts from the mean of one adapter per task (AdapterSoup's averaging).
`continued` is the average, trained for 50 more steps on the training tasks. All learning rates
were chosen on compositions that are neither trained nor held out. The reference is `shared` in
phase mu. Seconds are a slot's share of a run, on a machine that also had other work.

{table(ways, ("shared", "mu"))}

{answers(ways, QUESTIONS)}

Routes alone, over the number of heads:

{curve(ways, "heads", {1: "poly", 8: "mhr"} | {n: f"mhr-h{n}" for n in (2, 4, 16, 32)})}

The same over the number of skills:

{curve(ways, "skills", {8: "mhr"} | {n: f"mhr-k{n}" for n in (2, 4, 16, 32)})}

Gradient alignment between training tasks at the end of training (mean cosine over sites and pairs;
"effective": of the tasks' own adapters; "inventory's": of the shared parameters):

{alignment_table(folder, stages)}
"""


FEWER = "8 shots"
"""The end of the names of recipes with fewer examples."""


def _by_paper(way: tuple[str, str]) -> tuple[str, str]:
    return way if way[1] == "zero-shot" else (way[0], f"{way[1]}, paper")


def real_section(folder: Path) -> str:
    """The real study."""
    every = real_ways(folder, "test")
    chance = statistics.fmean(score["chance"] for score in every["shared", "zero-shot"])
    fewer = {way: found for way, found in every.items() if way[1].endswith(FEWER)}
    ways = {way: found for way, found in every.items() if way not in fewer}
    develop = real_ways(folder, "develop")
    count = len({r["seed"] for r in ways["mhr", "full, paper"]})
    seeds = "one seed" if count == 1 else f"{count} seeds"
    found = alignment_table(folder, {name: [f"aligned-{name}"] for name in MEASURED})
    aligned = (
        f"\nGradient alignment between training tasks at the end of training:\n\n{found}\n"
        if found.count("\n") > 1
        else ""
    )
    paper = tuple(
        (question, _by_paper(one), _by_paper(other)) for question, one, other in QUESTIONS
    )
    ours = ("routes alone, our rate over the paper's", ("mhr", "z, ours"), ("mhr", "z, paper"))
    return f"""
## Real tasks

The base model is all-MiniLM-L6-v2, frozen, in bfloat16, which answers tasks with choices. There
are 46 training tasks, 15 more on which settings were compared ("development"), and
{len(by_task(ways["mhr", "full, paper"]))} held-out tasks for the table, which were scored once.
Rank 4, 8 skills, 16 heads; 1,500 steps of 16 examples; then 32 shots, 24 steps of 8, {seeds}.
`paper` is `--recipe paper`: AdamW, rates 1e-3 and 0.1, decay 0.01, clipping at 0.1.
`shared-matched` has rank 32; `continued` is the average, trained for 300 more steps on the
training tasks. The reference is `shared` in phase mu. Guessing among the choices gives
{chance:.3f}.

{table(ways, ("shared", "mu, paper"))}

{answers(ways, (*paper, ours))}

With 8 shots instead of 32:

{table(fewer, ("shared", f"mu, paper {FEWER}"))}

The next table has the development tasks, which no inventory has learned and which are not in the
table above. `usage` starts at the mean weights of the training tasks, `nearest` at those of the
training tasks that answer best, and `after z` at routes tuned with half of the steps. `mhr-lr2e3`
was trained at twice the rate:

{table(develop, ("mhr", "mu, paper"))}
{aligned}"""


def seq2seq_section(folder: Path) -> str:
    """The real tasks with the demo's T5."""
    ways = real_ways(folder, "test")
    scores = {score["task"]: score for score in read(RESULTS / "real", "zero-shot-shared")}
    chance = statistics.fmean(scores[t]["chance"] for t in by_task(ways["shared", "mu, demo"]))
    return f"""
## Real tasks, with a sequence-to-sequence base

This study has the same training tasks and every third held-out one. Its base model is the demo's
T5 of 0.8 million parameters, which reads bytes (256 of an example) and was trained on the
generated tasks only, never on English. Rates are the demo's, 5e-3 and 1 for routes; 300 steps of
16 examples, then 32 shots, 24 steps of 8, one seed. Guessing among the choices gives {chance:.3f}
on these tasks.

{table(ways, ("shared", "mu, demo"))}
"""


def page() -> str:
    """The whole page."""
    story = (Path(__file__).parent / "paper_story.md").read_text(encoding="utf-8")
    return "\n".join(
        [
            HEAD.strip(),
            "",
            story.strip(),
            lm_section(RESULTS / "lm").rstrip(),
            generated_section(RESULTS / "generated").rstrip(),
            real_section(RESULTS / "real").rstrip(),
            seq2seq_section(RESULTS / "seq2seq").rstrip(),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
