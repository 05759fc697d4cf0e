"""Routes without training against PEFT's Arrow: SmolLM2 with 8, 32 and 89 random LoRAs.

    python benchmarks/token_routes.py

One forward of 1,024 tokens without gradients, on adapted query and value projections of rank 8.
"base" is the model alone, "one" a single LoRA. Contenders take turns in every round, and each is
divided by PEFT's Arrow of the same round; what the LoRAs cost is that without the base model's
share. The result is `benchmarks/results/token_routes.json`.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Call, interleave, peak_megabytes, summarise

import polyroute as pr
from polyroute.host.files import make_folder, write_json
from polyroute.saved.runs import machine

RESULTS = Path(__file__).parent / "results"
NAME = "token_routes.json"
SIZES = (8, 32, 89)
TOKENS = (4, 256)
TOP_K = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_loras(Path(folder), max(SIZES))
        for size in SIZES:
            found[str(size)] = _measured(Path(folder), size, options.rounds, options.dtype)
            write_json(
                make_folder(RESULTS) / NAME,
                {"loras": found, "tokens": TOKENS, "top_k": TOP_K, "threads": options.threads,
                 "dtype": options.dtype, "machine": machine()},
            )  # fmt: skip
            print(size, found[str(size)]["summary"])


def _write_loras(folder: Path, count: int) -> None:
    import peft

    base, _ = pr.load_base("smollm2")
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base, config)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / f"lora-{number:02d}")


@torch.no_grad()
def _measured(folder: Path, size: int, rounds: int, dtype: str) -> dict[str, Any]:
    import peft
    from peft.tuners.lora.arrow import create_arrow_model

    names = [f"lora-{number:02d}" for number in range(size)]
    ids = torch.randint(5, 40_000, TOKENS, generator=torch.Generator().manual_seed(0))
    alone, _ = pr.load_base("smollm2", dtype=dtype)
    base, _ = pr.load_base("smollm2", dtype=dtype)
    library = pr.Library.from_peft({name: folder / name for name in names})
    ours = pr.attach(base, library).eval()
    base, _ = pr.load_base("smollm2", dtype=dtype)
    config = peft.ArrowConfig(top_k=TOP_K, router_temperature=1.0, rng_seed=0)
    theirs: Any = create_arrow_model(base, [str(folder / name) for name in names], config).eval()
    arrow, spectr = pr.Arrow(top_k=TOP_K), pr.SpectR(top_k=TOP_K)
    calls: dict[str, Call] = {
        "base": lambda: alone(input_ids=ids, use_cache=False),
        "one": lambda: ours(input_ids=ids, use_cache=False, tasks=names[0]),
        "arrow": lambda: ours(input_ids=ids, use_cache=False, tasks=arrow),
        "spectr": lambda: ours(input_ids=ids, use_cache=False, tasks=spectr),
        "PEFT arrow": lambda: theirs(input_ids=ids, use_cache=False),
    }
    for call in calls.values():
        call()  # prototypes are made, and memory is there
    own, other = calls["arrow"]().logits, calls["PEFT arrow"]().logits
    seconds = interleave(calls, rounds, "cpu")
    cpu = {name: values["cpu_s"] for name, values in seconds.items()}
    added = {
        name: [one - other for one, other in zip(values, cpu["base"], strict=True)]
        for name, values in cpu.items()
    }
    return {
        "seconds": seconds,
        "summary": {
            name: {
                "cpu_s": statistics.median(cpu[name]),
                "of_peft": summarise(cpu[name], cpu["PEFT arrow"]),
                "added_of_peft": summarise(added[name], added["PEFT arrow"]),
            }
            for name in calls
        },
        "peak_megabytes": {name: peak_megabytes(call, "cpu") for name, call in calls.items()},
        "logits_differ_by": float((own - other).norm() / other.norm()),
    }


def token_route_lines(results: Path, table: Callable[..., list[str]]) -> list[str]:
    """The section of docs/benchmarks.md; empty before anything was measured."""
    path = results / NAME
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    rows, tokens = [], math.prod(found["tokens"])
    for size, own in found["loras"].items():
        for name in ("one", "arrow", "spectr", "PEFT arrow"):
            added = own["summary"][name]["added_of_peft"]
            of_peft = own["summary"][name]["of_peft"]["median"]
            middle = f"{added['median']:.2f} ({added['q25']:.2f}-{added['q75']:.2f})"
            peak = own["peak_megabytes"][name] - own["peak_megabytes"]["base"]
            rows.append([size, TITLES[name], middle, f"{of_peft:.2f}", f"{peak:+.0f} MB"])
    head = ["LoRAs", "route", "added time, of PEFT's", "whole forward, of PEFT's", "added memory"]
    return [
        "## Routes without training",
        "",
        f"SmolLM2-135M in {found['dtype']}, LoRAs of rank 8 on queries and values, one forward of "
        f"{tokens:,} tokens, {found['top_k']} LoRAs for each token; CPU time on {found['threads']} "
        "thread. What the LoRAs add to the base model's time is divided by what PEFT's Arrow adds "
        "in the same round: median and quartiles. `python benchmarks/token_routes.py` measures it.",
        "",
        *table(head, rows),
    ]


TITLES = {
    "one": "one LoRA for all",
    "arrow": "`pr.Arrow()`",
    "spectr": "`pr.SpectR()`",
    "PEFT arrow": "PEFT's Arrow",
}


if __name__ == "__main__":
    main()
