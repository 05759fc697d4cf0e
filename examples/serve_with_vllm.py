"""Serving tasks of a run: `python examples/serve_with_vllm.py RUN OUT TASK...`.

This writes each task as an ordinary LoRA and prints the command with which vLLM serves all of them
on one copy of the base model. A request names its task as `"model"`; vLLM batches requests of
different tasks together.
"""

import shlex
import sys
from pathlib import Path

import polyroute as pr
from polyroute.loading import load_base
from polyroute.saved.runs import read_run

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `--max-lora-rank`."""


def main(run: str, out: str, *tasks: str) -> str:
    """Export the tasks, and return the command that serves them."""
    name = read_run(run)["config"]["model"]
    base, _ = load_base(name)
    model = pr.from_pretrained(base, run)
    if model.adapter_config.adapter != "lora":
        sys.exit("vLLM serves only LoRAs: merge a task of this run into the base model instead")
    for task in tasks:
        model.export_peft(task, Path(out) / task)
    rank = min(r for r in VLLM_RANKS if r >= model.adapter_config.rank)
    modules = [f"{task}={Path(out) / task}" for task in tasks]
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", *modules]
    return shlex.join(["vllm", "serve", name, *lora])


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
