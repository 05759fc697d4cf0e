"""Write docs/benchmarks.md and its figures from benchmarks/results.

    python benchmarks/page.py

Nothing is measured here: the same results give the same page. `tests/test_benchmarks.py` makes sure
that the page is that of the results beside it.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library_merging import merging_lines
from library_page import library_lines, way_lines
from measure import summarise
from plots import draw_all, has_overview, has_peaks
from serving_page import serving_lines
from smollm2_page import smollm2_lines
from token_routes import token_route_lines

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = "lora"
WAYS = "<!-- benchmarks/page.py makes this table. -->"
"""Stands before the table of docs/library.md."""
SECTIONS = {
    "main": (
        "Training steps",
        "Forward and backward, without an optimizer. `-b` is the batch size, `-u` the number of "
        "different tasks in it; 64 tokens per example.",
    ),
    "overhead": (
        "Where calls dominate",
        "Hidden size 64, 4 examples of 8 tokens: there is hardly anything to compute, so this "
        "shows what the number of an adapter's operations costs.",
    ),
    "generate": (
        "Generation",
        "Greedy, with a cache: 32 tokens after a prompt of 32. `merged` is polyroute with the "
        "batch's only task folded into the weights.",
    ),
    "growth": (
        "How cost grows with skills and heads",
        "One case compares inventories of several sizes on a T5-like model with 3 + 3 layers. `s` "
        "is the number of skills, `h` the number of heads, and `-l` the tokens per example. "
        "`-adamw` includes, for every contender, a step of AdamW over everything that trains; that "
        "part grows with the parameters of the inventory.",
    ),
    "length": (
        "Length of the sequences",
        "Every batch has 1,024 tokens, in longer and longer sequences.",
    ),
    "rank": ("Rank", "`-r` is the rank, also that of LoRA; without it the rank is 4."),
    "checkpointing": ("Gradient checkpointing", "`-ckpt` uses non-reentrant checkpointing."),
    "gpu": (
        "On a GPU",
        "Llama-like with 1 and T5-XL-like with 3 billion parameters, bf16, random weights. `lora` "
        "has bf16 factors; `lora as shipped` has PEFT's default, fp32 factors beside a bf16 model. "
        "`compiled` is `torch.compile` of the base model, `graph` one CUDA graph of the step.",
    ),
    "growth-gpu": (
        "How cost grows, on a GPU",
        "Llama-like with 1 billion parameters, bf16, a batch so short that launches dominate.",
    ),
}
RELATED = {
    "rank": ["t5-b16-u1", "t5-b16-u16"],
    "checkpointing": ["t5-b16-u4", "llama-b16-u4"],
}
"""Cases of other groups that a section shows too, for comparison."""
PAIRS = [
    ("4 to 8 skills", "s4 h8", "s8 h8"),
    ("4 to 32 skills", "s4 h8", "s32 h8"),
    ("4 to 128 skills", "s4 h8", "s128 h8"),
    ("1 to 8 heads", "s8 h1", "s8 h8"),
    ("1 to 32 heads", "s8 h1", "s8 h32"),
]
INCLUDED = ["table_growth", "adapt_many"]
HEAD = """\
# Benchmarks

`python benchmarks/page.py` writes this page from `benchmarks/results/`, so do not change its text
or figures here. `make bench` measures again and rewrites the page.

All contenders of a case run in one process, one after the other, in the order A B C D, D C B A,
and so on. Each ratio compares two times of the same round: the contender's and that of PEFT LoRA,
of the same rank on the same frozen weights. The tables show the **median and the quartiles** over
the rounds; a ratio below 1 is faster than PEFT LoRA. Before anything is timed, polyroute's logits
are compared with those of a PEFT Poly that holds the same skills and routes, so both compute the
same function.

- `base` is the frozen model alone, the lower bound. `lora` is PEFT LoRA; its column shows the time.
  `poly` is PEFT Poly as shipped, and `polyroute` is MHR in this library. Unless stated otherwise,
  there are 8 skills, 8 heads, rank 4 and a table of 64 tasks.
- *Operations* are those that PyTorch dispatches in one call, without views. *Waits* says how often
  the host must wait for the device; on a CPU, how often it reads a tensor's value, which would make
  it wait on a GPU.
- *Kept* is what the graph keeps for backward, beyond the model's parameters. *Peak* is how far
  memory rises during one call, gradients included (CPU: resident memory of a forked process,
  measured with one thread; GPU: what PyTorch has allocated).
"""
CASE_TABLES = {
    "Operations, waits": ("ops", "host_syncs"),
    "MB kept for backward, peak": ("saved_mb", "peak_mb"),
}

FIGURES = {
    "ops": "operations",
    "host_syncs": "waits",
    "saved_mb": "MB kept for backward",
    "peak_mb": "MB at the peak",
}

Report = dict[str, Any]


# ---------------------------------------------------------------- reading


def read_cases(reports: Iterable[Report]) -> dict[str, list[Report]]:
    """Cases by section; what ran on a GPU is in sections of its own."""
    groups: dict[str, list[Report]] = {}
    for report in reports:
        for case in report["cases"]:
            group = case["group"]
            if case["device"] == "cuda":
                group = "growth-gpu" if len(case["settings"]) > 1 else "gpu"
            groups.setdefault(group, []).append(case)
    for group, names in RELATED.items():
        related = [case for case in groups.get("main", []) if case["name"] in names]
        if group in groups:
            groups[group] = related + groups[group]
    return groups


def read_reports(results: Path) -> list[Report]:
    paths = [results / name for name in ("step_time.json", "step_time_cuda.json")]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


# ---------------------------------------------------------------- tables


def spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['q25']:.2f}-{ratio['q75']:.2f})"


def milliseconds(contender: Mapping[str, Any]) -> str:
    return f"{1000 * statistics.median(contender['wall_s']):.0f} ms"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10 or isinstance(value, int) else f"{value:.1f}"


def figures(contender: Mapping[str, Any] | None, keys: Sequence[str]) -> str:
    values = [number((contender or {}).get(key)) for key in keys]
    return "-" if set(values) == {"-"} else ", ".join(values)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def contenders_of(cases: Iterable[Report]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["contenders"]))


def ratio_cell(case: Report, name: str) -> str:
    contender = case["contenders"].get(name)
    if contender is None:
        return "fails" if name in case["failed"] else "-"
    return milliseconds(contender) if name == REFERENCE else spread(contender["wall_ratio"])


def failures(cases: Iterable[Report]) -> list[str]:
    """A line for every contender that could not take part, with its error."""
    lines = [
        f"`{name}` fails in `{case['name']}`: {reason}"
        for case in cases
        for name, reason in case["failed"].items()
    ]
    return [*lines, ""] if lines else []


def section(group: str, cases: list[Report]) -> list[str]:
    title, text = SECTIONS[group]
    names = contenders_of(cases)
    lines = [f"## {title}", "", text, ""]
    if group == "gpu":
        lines += ["![Step time on a GPU](figures/gpu.svg)", ""]
    lines += table(
        ["time", *names],
        [[f"`{c['name']}`", *(ratio_cell(c, name) for name in names)] for c in cases],
    )
    lines += failures(cases)
    for heading, keys in CASE_TABLES.items():
        rows = [
            [f"`{c['name']}`", *(figures(c["contenders"].get(name), keys) for name in names)]
            for c in cases
        ]
        if any(set(row[1:]) != {"-"} for row in rows):
            lines += table([heading, *names], rows)
    return lines


def growth_section(group: str, cases: list[Report]) -> list[str]:
    title, text = SECTIONS[group]
    lines = [f"## {title}", "", text, ""]
    lines += [f"![Step time over the number of skills and heads](figures/{group}.svg)", ""]
    lines += ["Polyroute's time with a larger inventory over that with a smaller one:", ""]
    rows = [
        [f"`{case['name']}`", *(growth_cell(case, *pair[1:]) for pair in PAIRS)] for case in cases
    ]
    lines += table(["growth", *(pair[0] for pair in PAIRS)], rows)
    for case in cases:
        time = milliseconds(case["contenders"][REFERENCE])
        lines += [f"`{case['name']}`, relative to PEFT LoRA ({time}):", ""]
        rows = [
            [name, spread(c["wall_ratio"]), *(number(c.get(key)) for key in FIGURES)]
            for name, c in case["contenders"].items()
        ]
        lines += table(["contender", "time", *FIGURES.values()], rows)
    return [*lines, *failures(cases)]


def growth_cell(case: Report, small: str, large: str) -> str:
    """Polyroute with one inventory over polyroute with another, round by round."""
    found = case["contenders"]
    names = [f"polyroute {large}", f"polyroute {small}"]
    if not set(names) <= set(found):
        return "-"
    return spread(summarise(*(found[name]["wall_s"] for name in names)))


def machine_lines(reports: Iterable[Report]) -> list[str]:
    """What the results were measured on."""
    lines = []
    for report in reports:
        m, cases = report["machine"], report["cases"]
        device = f"{m['gpu']}, on " if m["gpu"] else ""
        dates = sorted(case["date"][:10] for case in cases)
        days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        commits = ", ".join(dict.fromkeys(str(case["commit"]) for case in cases))
        rounds = ", ".join(str(n) for n in sorted({case["rounds"] for case in cases}))
        lines.append(
            f"Measured on {device}{m['cpu']}, {m['cores']} cores, torch threads: {m['threads']}; "
            f"torch {m['torch']}, transformers {m['transformers']}, PEFT {m['peft']}, polyroute "
            f"{m['polyroute']} at {commits}; {days}; {rounds} rounds."
        )
        lines.append("")
    return lines


def included(results: Path, name: str) -> list[str]:
    """The tables of another benchmark, one heading deeper, with links that hold from docs/."""
    path = results / f"{name}.md"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8").strip()
    text = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
    text = re.sub(r"\]\((?!\w+:|/|#)", "](../benchmarks/results/", text)
    return [text, ""]


def render(results: Path) -> str:
    """The page."""
    reports = [report for report in read_reports(results) if report["cases"]]
    groups = read_cases(reports)
    lines = [HEAD, *machine_lines(reports)]
    if has_overview(groups):
        lines += ["![Step time relative to PEFT LoRA](figures/step-time.svg)", ""]
    if has_peaks(groups):
        lines += ["![Memory of a training step](figures/memory.svg)", ""]
    for group in SECTIONS:
        if group in groups:
            show = growth_section if group.startswith("growth") else section
            lines += show(group, groups[group])
        elif group == "gpu":
            lines += ["## On a GPU", "", "Not measured yet.", ""]
    for own_lines in (
        smollm2_lines, serving_lines, token_route_lines, merging_lines, library_lines,
    ):  # fmt: skip
        lines += own_lines(results, table)
    for name in INCLUDED:
        lines += included(results, name)
    if (results / "paper").exists():
        lines += [
            "For quality, see [the paper at our scale](paper.md).",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def with_ways(page: str, results: Path) -> str:
    """The page of libraries, with its table anew."""
    lines = "\n".join(way_lines(results, table))
    return re.sub(rf"(?<={WAYS}\n\n).*?\n\n", lambda _: lines + "\n", page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    groups = read_cases(read_reports(options.results))
    (options.docs / "figures").mkdir(parents=True, exist_ok=True)
    draw_all(groups, options.docs / "figures")
    (options.docs / "benchmarks.md").write_text(render(options.results), encoding="utf-8")
    library = options.docs / "library.md"
    if library.exists():
        text = with_ways(library.read_text(encoding="utf-8"), options.results)
        library.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
