"""The section of docs/benchmarks.md about serving, from `results/serving.json`."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["serving_lines"]

OURS, MERGED, PEFT = "32 tasks", "one merged task", "PEFT, adapter_names"
TITLES = {OURS: "32 tasks", MERGED: "one merged task", PEFT: "PEFT's `adapter_names`"}
Rounds = Sequence[Mapping[str, Mapping[str, float]]]


def serving_lines(results: Path, table: Callable[..., list[str]]) -> list[str]:
    """The section; empty before anything was measured."""
    path = results / "serving.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = ["## Serving", ""]
    if "throughput" in found:
        lines += _throughput(found["throughput"]["measured"], table)
    lines += [*_sentences(found), "`make bench-serve` measures all of it.", ""]
    return lines


def _throughput(found: Mapping[str, Any], table: Callable[..., list[str]]) -> list[str]:
    lines = [
        "Clients that each send one request after the other, and ask for "
        f"{found['new_tokens']} tokens after a prompt of a real task. Together they ask each of 32 "
        "tasks equally often: at every moment different tasks, the same prompts of one task that "
        "is merged into the base weights, and batches of the same tasks by PEFT's `generate`. In "
        "bfloat16 for SmolLM2, float32 for the tiny model. Medians of rounds in which the two "
        "servers take turns, torch with one thread; ratios are medians within rounds. LoRAs on "
        "all linear layers of SmolLM2 are 420 small products in each step, and their factors for "
        "32 tasks 78 MB beside 269 MB of weights; on queries and values they are 120 products and "
        "15 MB.",
        "",
    ]
    rows = []
    for setup, by_clients in found["setups"].items():
        alone = _median(by_clients["1"], OURS, "tokens_per_second")
        for clients, rounds in sorted(by_clients.items(), key=lambda item: int(item[0])):
            for name, title in TITLES.items():
                speed = _median(rounds, name, "tokens_per_second")
                ratio = statistics.median(
                    own[name]["tokens_per_second"] / own[MERGED]["tokens_per_second"]
                    for own in rounds
                )
                rows.append([
                    setup, clients, title, f"{speed:.0f}",
                    "" if name == MERGED else f"{ratio:.2f}",
                    f"{speed / alone:.1f}",
                    f"{_median(rounds, name, 'p50'):.2f}", f"{_median(rounds, name, 'p95'):.2f}",
                ])  # fmt: skip
    head = ["inventory", "clients", "served", "tokens/s", "of merged", "of one at a time"]
    head += ["p50, s", "p95, s"]
    return [*lines, *table(head, rows)]


def _median(rounds: Rounds, name: str, key: str) -> float:
    return statistics.median(own[name][key] for own in rounds)


def _sentences(found: Mapping[str, Any]) -> list[str]:
    """What the other cases measured."""
    said = []
    if "rows" in found:
        own = found["rows"]["measured"]
        said.append(
            f"A task that is not in memory takes {own['cold'] * 1000:.2f} ms more to be found and "
            "read."
        )
    if "learn" in found:
        own = found["learn"]["measured"]
        seconds = statistics.median(own["seconds"])
        said.append(
            f"A task that is added from {own['examples']} examples (`{own['task']}`) answers after "
            f"{seconds:.0f} s, with {found['learn']['machine']['threads']} threads of torch."
        )
    if "memory" in found:
        own = found["memory"]["measured"]
        each = " and ".join(
            f"{one['after']:.0f} MB with {int(count):,} tasks" for count, one in own.items()
        )
        said.append(f"After 400 of its tasks were asked, the server has {each} in its folder.")
    return [" ".join(said), ""] if said else []
