"""Merging LoRAs of SmolLM2 that were trained apart: which way keeps what each can do.

    python benchmarks/library_merging.py --data SUITE

The eight LoRAs of `inventories/smollm2/loras` are merged into one, which then answers all eight
tasks. How much each merge is multiplied by is chosen on the validation split, for all ways alike;
the scores are those of the test split. The result is `benchmarks/results/library_merging.json`, and
the table is part of docs/benchmarks.md.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from paper_tables import difference, interval

import polyroute as pr
from polyroute.host.files import make_folder, write_json
from polyroute.library.names import METHODS
from polyroute.saved.runs import machine

RESULTS = Path(__file__).parent / "results"
NAME = "library_merging.json"
LORAS = Path(__file__).parents[1] / "inventories" / "smollm2" / "loras"
SCALES = (0.1, 0.3, 0.6, 1.0, 2.0)
"""What a merge is multiplied by; TIES and KnOTS are means of those that agree, the others sums."""
RANK = 16
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/suite")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validation", type=int, default=20, help="examples of each task")
    parser.add_argument("--test", type=int, default=120)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    suite, library = pr.open_suite(options.data), pr.Library.from_peft(LORAS)
    tasks = list(library)

    def scored(folder: Path | None, split: str, most: int) -> list[Result]:
        base, tokenizer = pr.load_base("smollm2", dtype="bfloat16")
        kind = pr.kind_of(base, tokenizer, max_input=256, max_target=32)
        route, own = None, library
        if folder is not None:
            own, route = pr.Library.from_peft({"merged": folder}), "merged"
        model = pr.attach(base, own).eval()
        found = pr.evaluate(model, kind, suite, tasks, route=route, split=split, max_examples=most)
        return [score.to_dict() for score in found]

    with tempfile.TemporaryDirectory() as place:
        found: dict[str, Any] = {"individual": {"results": scored(None, "test", options.test)}}
        for method in METHODS:
            if method == "mean":  # with a scale it is the sum with another
                continue
            tried, best, chosen = {}, -1.0, 0.0
            merged = library.merge(method, rank=RANK)
            for scale in SCALES:
                folder = Path(place) / f"{method}-{scale}"
                (scale * merged).save_peft(folder)
                results = scored(folder, "validation", options.validation)
                tried[str(scale)] = sum(r["score"] for r in results) / len(results)
                if tried[str(scale)] > best:
                    best, chosen = tried[str(scale)], scale
            found[method] = {
                "validation": tried,
                "scale": chosen,
                "lost": merged.error / max(merged.norm(), 1e-12),
                "results": scored(Path(place) / f"{method}-{chosen}", "test", options.test),
            }
            write_json(
                make_folder(RESULTS) / NAME,
                {"merges": found, "tasks": tasks, "rank": RANK, "machine": machine()},
            )
            print(method, tried, flush=True)


def merging_lines(results: Path, table: Callable[..., list[str]]) -> list[str]:
    """The section of docs/benchmarks.md; empty before anything was measured."""
    path = results / NAME
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["merges"]
    own, rows = merges["individual"]["results"], []
    for name, one in merges.items():
        gap = "" if name == "individual" else difference(one["results"], own).signed
        scale = f"{one['scale']:g}" if "scale" in one else ""
        rows.append([name, scale, str(interval(_scores(one["results"]))), gap])
    head = ["merge", "times", "score", "minus each task's own LoRA"]
    return [
        "## Merging LoRAs",
        "",
        f"SmolLM2-135M with the {len(content['tasks'])} LoRAs of `inventories/smollm2/loras` (rank "
        f"2, trained apart), merged into one of rank {content['rank']} that answers all of their "
        "tasks. What a merge is multiplied by was chosen on validation examples. Means over tasks, "
        "with 95 % intervals. `python benchmarks/library_merging.py` measures it.",
        "",
        *table(head, rows),
    ]


def _scores(results: Sequence[Result]) -> list[float]:
    return [result["score"] for result in results]


if __name__ == "__main__":
    main()
