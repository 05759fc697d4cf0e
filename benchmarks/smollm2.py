"""SmolLM2-135M on a CPU: training, scoring, generation and adaptation, against PEFT as it is used.

    python benchmarks/smollm2.py [--cases step scores ...] [--dtype auto] [--rounds 5] [--threads 2]

Contenders of `step`, `scores` and `generation`: PEFT LoRA as users run it (transformers' defaults,
padded rows, the model's own loss of all logits, each choice a row with its own copy of the prompt),
PEFT Poly likewise, and polyroute as `polyroute train` and `polyroute evaluate` run it. The frozen
base is scored and generates through polyroute's own code without an inventory: the least there is
to do. All have the base model in the same type: bfloat16 where the CPU multiplies it fast, else
float32. They take turns, A B C, C B A. Printed are medians, and medians of the ratio to the
reference within a round. `results/smollm2-bfloat16.json` and `smollm2-float32.json` keep all,
case by case, and a case that is not run stays as it is there. Peak memory is that of a process of
its own.

The texts are random tokens. Their lengths are drawn once: prompts of 20 to 200 tokens around a
median of 70, targets of 2 to 6, and ten choices of 2 to 6. 16 rows of 8 tasks make a batch. `adapt`
and `sharing` have real tasks (`smollm2_adapt.py`, `smollm2_sharing.py`), and `profile` says where
the time of a step goes (`smollm2_profile.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import smollm2_adapt
import smollm2_profile
import smollm2_sharing
import torch
from measure import STATUS
from torch import Tensor
from transformers import GenerationConfig

import polyroute as pr
from polyroute.host.dtypes import AUTO, settled_dtype
from polyroute.kinds.batches import IGNORED, padded
from polyroute.loading import load_base
from polyroute.study.base_alone import BaseAlone

RESULTS = Path(__file__).parent / "results"
TASKS = [f"task{i}" for i in range(8)]
RANK = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REFERENCE, BASE, POLY, OURS = "PEFT LoRA", "frozen base", "PEFT Poly", "polyroute"
CASES = {
    "step": (REFERENCE, POLY, OURS),
    "scores": (BASE, REFERENCE, POLY, OURS),
    "generation": (BASE, REFERENCE, OURS),
}
"""The contenders of each case."""
NEW_TOKENS = 32
ROWS_AT_ONCE = 16
"""Rows of a forward in which PEFT's models score choices."""


def drawn(rows: int, seed: int) -> list[dict[str, Any]]:
    """Encoded rows of random tokens."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(i) for i in random.integers(10, 40_000, count)]

    found = []
    for _ in range(rows):
        length = int(np.clip(np.exp(random.normal(np.log(70), 0.5)), 20, 200))
        choices = [[*ids(int(random.integers(1, 6))), 2] for _ in range(10)]
        found.append(
            {"task": TASKS[int(random.integers(8))], "prompt_ids": ids(length),
             "target_ids": choices[0], "choice_ids": choices, "label": 0}
        )  # fmt: skip
    return found


class Contender:
    """A model, and what is timed of it."""

    trained: Sequence[torch.nn.Parameter]
    loss: Callable[[list[dict[str, Any]]], Tensor]
    scores: Callable[[list[dict[str, Any]]], Any]
    generation: Callable[[list[dict[str, Any]]], Any]

    def step(self, rows: list[dict[str, Any]]) -> None:
        """One training step."""
        self.loss(rows).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        for parameter in self.trained:
            parameter.grad = None

    def start(self) -> "Contender":
        """Make the optimizer."""
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        return self


def generating(model: Any, rows: list[dict[str, Any]], **more: Any) -> Tensor:
    """As many tokens for every row, by greedy search."""
    prompts = [row["prompt_ids"] for row in rows]
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2,
        eos_token_id=2,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        out: Tensor = model.generate(
            input_ids=padded(prompts, 2, side="left"),
            attention_mask=padded([[1] * len(ids) for ids in prompts], 0, side="left"),
            generation_config=settings,
            **more,
        )
    model.train()
    assert out.shape[1] == max(map(len, prompts)) + NEW_TOKENS
    return out


def without_adapter(base: Any, tokenizer: Any) -> Contender:
    one, model = Contender(), BaseAlone(base)
    kind = pr.kind_of(model, tokenizer, max_input=512, max_target=64)
    one.scores = lambda rows: kind.scores(model, rows)
    one.generation = lambda rows: generating(model, rows)
    return one


def through_polyroute(base: Any, tokenizer: Any) -> Contender:
    one = Contender()
    config = pr.MHRConfig(num_skills=8, num_heads=8, rank=RANK, target_modules=TARGETS)
    model = pr.attach(base, config, TASKS)
    kind = pr.kind_of(model, tokenizer, max_input=512, max_target=64)
    packing = kind.packing_of(model, TASKS[0], in_training_mode=True)
    assert packing is not None
    one.trained = [p for p in model.learned() if p.requires_grad]
    model.train()
    one.loss = lambda rows: kind.loss(model, kind.collate_packed(rows, packing))
    one.scores = lambda rows: kind.scores(model, rows)
    one.generation = lambda rows: generating(model, rows, tasks=[row["task"] for row in rows])
    return one.start()


def through_peft(base: Any, name: str) -> Contender:
    one = Contender()
    if name == REFERENCE:
        config: Any = peft.LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    else:
        config = peft.PolyConfig(
            r=RANK,
            target_modules=TARGETS,
            n_tasks=8,
            n_skills=8,
            n_splits=8,
            poly_type="poly",
            task_type="CAUSAL_LM",
        )
    model = peft.get_peft_model(base, config)
    one.trained = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def batch(pairs: Sequence[tuple[dict[str, Any], list[int]]]) -> dict[str, Tensor]:
        both = [row["prompt_ids"] + ids for row, ids in pairs]
        found = {
            "input_ids": padded(both, 2),
            "attention_mask": padded([[1] * len(ids) for ids in both], 0),
            "labels": padded([[IGNORED] * len(r["prompt_ids"]) + ids for r, ids in pairs], IGNORED),
        }
        if name != REFERENCE:
            found["task_ids"] = torch.tensor([TASKS.index(row["task"]) for row, _ in pairs])
        return found

    def scores(rows: list[dict[str, Any]]) -> list[Tensor]:
        pairs = [(row, ids) for row in rows for ids in row["choice_ids"]]
        found = []
        model.eval()
        with torch.no_grad():
            for start in range(0, len(pairs), ROWS_AT_ONCE):
                inputs = batch(pairs[start : start + ROWS_AT_ONCE])
                labels = inputs.pop("labels")[:, 1:]
                logits = model(**inputs, use_cache=False).logits[:, :-1].float()
                each = -torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
                )
                found.append(each.sum(1))
        model.train()
        return list(torch.cat(found).split(10))

    one.loss = lambda rows: model(**batch([(r, r["target_ids"]) for r in rows])).loss
    one.scores = scores
    one.generation = lambda rows: generating(model, rows)
    return one.start()


def built(name: str, dtype: str) -> Contender:
    """A contender with a base model of its own."""
    base, tokenizer = load_base("smollm2", dtype=dtype)
    if name == BASE:
        return without_adapter(base, tokenizer)
    if name == OURS:
        return through_polyroute(base, tokenizer)
    base.set_attn_implementation("sdpa")  # transformers' default
    base.requires_grad_(False)
    return through_peft(base, name)


def timed(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def peak_of(name: str, what: str, dtype: str) -> float:
    """Peak memory of a process that does one thing once, in GB."""
    command = [sys.executable, __file__, "--memory", name, what, "--dtype", dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory(name: str, what: str, dtype: str) -> None:
    contender = built(name, dtype)
    getattr(contender, what)(drawn(16, 0))
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1e6)


def measured(what: str, rounds: int, dtype: str) -> dict[str, Any]:
    """One case, by contenders that take turns."""
    names = CASES[what]
    contenders = {name: built(name, dtype) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for one in contenders.values():
        getattr(one, what)(drawn(4, 99))
    for number in range(rounds):
        rows = drawn(16, number)
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(timed(partial(getattr(contenders[name], what), rows)))
    del contenders
    return {
        "cpu_seconds": seconds,
        "lengths": [[len(row["prompt_ids"]) for row in drawn(16, n)] for n in range(rounds)],
    }


def told(what: str, case: Mapping[str, Any]) -> None:
    """Print the medians of a case."""
    seconds = case.get("cpu_seconds", {})
    for name, own in seconds.items():
        of = seconds[REFERENCE if REFERENCE in seconds else first_like(name, seconds)]
        ratio = statistics.median(a / b for a, b in zip(own, of, strict=True))
        cpu = statistics.median(own)
        print(f"{what:10} {name:28} {cpu:8.2f} CPU s  ratio {ratio:.2f}", flush=True)


def first_like(name: str, names: Iterable[str]) -> str:
    """The first contender at the same thing, which stands before a comma."""
    return next(one for one in names if one.partition(", ")[0] == name.partition(", ")[0])


def main() -> None:
    """Run and write."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = [*CASES, "adapt", "sharing", "profile"]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--dtype", default=AUTO, choices=[AUTO, "bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", default="../shared/suite", help="the suite of real tasks")
    parser.add_argument("--steps", type=int, default=20, help="steps of `adapt`")
    parser.add_argument("--no-memory", action="store_true", help="measure no peaks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of results")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = settled_dtype(options.dtype)
    if options.memory:
        memory(*options.memory, dtype)
        return
    out = options.out / f"smollm2-{dtype}.json"
    document = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    for what in options.cases:
        if what == "adapt":
            case = smollm2_adapt.measured(
                options.data, options.steps, options.rounds, options.threads, dtype
            )
        elif what == "sharing":
            base, tokenizer = load_base("smollm2", dtype=dtype)
            case = smollm2_sharing.measured(base, tokenizer, options.data, options.rounds)
        elif what == "profile":
            ours = built(OURS, dtype)
            ours.step(drawn(4, 99))
            case = smollm2_profile.measured(
                [partial(ours.step, drawn(16, number)) for number in range(options.rounds)]
            )
        else:
            case = measured(what, options.rounds, dtype)
        document["cases"][what] = {
            "torch": torch.__version__, "threads": options.threads, "rounds": options.rounds,
            "date": time.strftime("%Y-%m-%d"), "load_average": os.getloadavg()[0],
            "capability": torch.backends.cpu.get_cpu_capability(), **case,
        }  # fmt: skip
        told(what, case)
        out.write_text(json.dumps(document, indent=1) + "\n")
        if what in CASES and not options.no_memory:
            peaks = {name: peak_of(name, what, dtype) for name in CASES[what]}
            document["cases"][what]["peak_gb"] = peaks
            print(what, "peak GB", peaks, flush=True)
            out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
