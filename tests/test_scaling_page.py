"""Every number of docs/scaling.md is computed again, and compared with what the library counts.

The page's first table gives its symbols. In backticks, `expression = value unit` is an equation,
and a column of a table whose heading has an expression holds its values.
"""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polyroute import MHRConfig, attach

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
UNITS = {
    "s": 1, "ms": 1e-3, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "GFLOP": 1e9, "PFLOP": 1e15, "%": 1e-2, "million": 1e6, "billion": 1e9, "per day": 1,
}  # fmt: skip
VALUE = re.compile(r"(-?[\d,]+(?:\.\d+)?(?:e\d+)?)(?: ?(\D.*))?")

Row = list[str]
Symbols = dict[str, float]


def tables(text: str) -> list[tuple[Row, list[Row]]]:
    """Headings and rows of every table."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        found.append((rows[0], rows[2:]))
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


TABLES = tables(PAGE)
SYMBOLS: Symbols = {row[0].strip("`"): number(row[1]) for row in TABLES[0][1]}


def evaluate(expression: str, symbols: Symbols) -> float:
    result: float = eval(expression.replace("·", "*"), {"__builtins__": {}}, dict(symbols))
    return result


def differs(expression: str, shown: str, symbols: Symbols) -> str | None:
    """What is wrong with a shown value, to the last digit that it shows."""
    match = VALUE.fullmatch(shown)
    assert match, f"{shown!r} is no value"
    scale = UNITS[match[2]] if match[2] else 1
    exact = evaluate(expression, symbols) / scale
    digits = Decimal(match[1].replace(",", ""))
    last = 10.0 ** int(digits.as_tuple().exponent)
    right = abs(float(digits) - exact) <= last * 0.500001
    return None if right else f"{expression} = {exact:.6g} {match[2] or ''}, not {shown}"


def equations() -> list[tuple[str, str]]:
    spans = re.findall(r"`([^`\n]+ = [^`\n]+)`", PAGE)
    return [tuple(span.rsplit(" = ", 1)) for span in spans]


def columns() -> list[tuple[str, str, Symbols]]:
    """Expression, shown value and symbols of each cell under an expression."""
    cells = []
    for heading, rows in TABLES[1:]:
        code = [re.search(r"`([^`]+)`", cell) for cell in heading]
        for row in rows:
            named = list(zip(code, row, strict=True))
            given = {c[1]: number(v) for c, v in named if c and c[1] in SYMBOLS}
            cells += [
                (c[1], v, {**SYMBOLS, **given}) for c, v in named if c and c[1] not in SYMBOLS
            ]
    return cells


def test_equations_hold() -> None:
    assert len(equations()) > 40
    wrong = [differs(expression, shown, SYMBOLS) for expression, shown in equations()]
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_tables_hold() -> None:
    assert len(columns()) > 40
    wrong = [differs(*cell) for cell in columns()]
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_a_wrong_value_is_found() -> None:
    assert differs("2·x", "4.1 kB", {"x": 2050}) is None
    assert differs("2·x", "4.2 kB", {"x": 2050}) == "2·x = 4.1 kB, not 4.2 kB"


@pytest.fixture(scope="module")
def llama_70b() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=int(SYMBOLS["vocab"]),
        hidden_size=int(SYMBOLS["hidden"]),
        intermediate_size=int(SYMBOLS["ffn"]),
        num_hidden_layers=int(SYMBOLS["layers"]),
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("skills", [8, 32, 128])
@pytest.mark.parametrize("granularity", ["finegrained", "blockwise", "coarsegrained"])
def test_the_library_counts_what_the_page_counts(
    llama_70b: LlamaForCausalLM, granularity: str, skills: int
) -> None:
    heads, rank = int(SYMBOLS["H"]), int(SYMBOLS["r"])
    config = MHRConfig(
        num_skills=skills,
        num_heads=heads,
        rank=rank,
        granularity=granularity,  # type: ignore[arg-type]
    )
    model = attach(llama_70b, config, ["one"])
    counts, stacks = model.counts(), model.inventory.stacks
    model.unload()
    embedding = llama_70b.get_input_embeddings().weight.numel()
    assert counts["base"] == SYMBOLS["base"]
    assert counts["base"] - embedding == SYMBOLS["linear"]
    assert counts["one_adapter"] == SYMBOLS["lora"]
    assert counts["inventory"] == skills * SYMBOLS["lora"]
    if granularity == "finegrained":
        assert len(model.sites) == len(model.routers) == SYMBOLS["N"]
        assert sorted(len(stack.sites) for stack in stacks) == [80, 160, 160, 160]
    rows = next(rows for heading, rows in TABLES if heading[0] == "one router per")
    shown = {(int(row[1]), int(row[2])): number(row[3]) for row in rows}
    assert shown[len(model.routers), skills] == counts["new_task_z"]


def test_the_measured_figures_are_those_on_file() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "step_time.json").read_text())
    cases = {case["name"]: case["contenders"] for case in report["cases"]}
    training = [n for n in cases if re.fullmatch(r"(t5|llama)-b(8|16)-u\d+", n)]
    decoding = [n for n in cases if re.fullmatch(r"(t5|llama)-generate-b8-u\d+", n)]

    def span(contender: str, names: list[str]) -> str:
        timed = [cases[name][contender] for name in names if contender in cases[name]]
        ratios = {f"{c['wall_ratio']['median']:.2f}" for c in timed}
        return " to ".join(sorted({min(ratios), max(ratios)}))

    text = " ".join(PAGE.split())
    assert span("polyroute", training) in text
    for contender in ("polyroute", "merged", "base"):
        assert span(contender, decoding) in text
    for name in training + decoding:
        assert cases[name]["polyroute"]["host_syncs"] == cases[name]["base"]["host_syncs"]
    one, four = (cases[f"t5-b16-u{tasks}"]["polyroute"]["saved_mb"] for tasks in (1, 4))
    assert f"{one:.0f} MB" in text
    assert f"{four:.0f} MB" in text
