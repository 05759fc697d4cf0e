"""A step of adapting SmolLM2 whose examples share what their prompts begin with, for `smollm2.py`.

The examples of a real task begin alike: with the chat template's system message, the header of the
turn and the instruction. "Shared" is what `polyroute adapt` does, "apart" is the same code told
that the model cannot share. Each round has other examples of the task, and the ways take turns.
"""

import time
from typing import Any

import polyroute as pr
from polyroute.adapting.memory import plan
from polyroute.adapting.row_batches import losses_of
from polyroute.adapting.slots import Slots
from polyroute.data.open import open_suite
from polyroute.kinds.packing import Packing
from polyroute.study.examples import encoded

__all__ = ["measured"]

TASKS = ("clinc_home_intent", "snips_object_name", "bbh_hyperbaton", "arc_easy", "boolq")
SHOTS = 16


def measured(base: Any, tokenizer: Any, data: str, rounds: int) -> dict[str, Any]:
    """CPU seconds of steps of one slot in phase mu, without the optimizer's, and their tokens."""
    config = pr.MHRConfig(num_skills=8, num_heads=8, rank=4)
    model = pr.attach(base, config, ["one", "two"])
    kind = pr.kind_of(model, tokenizer, max_input=512, max_target=64)
    suite, budget = open_suite(data), plan(model, kind, "mu", "8GB")
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}
    losses = kind.row_losses

    with Slots(model, "mu", 1) as slots:
        slots.start(0, seed=0)
        (slot,) = slots.names
        packing = kind.packing_of(model, slot)
        assert packing is not None
        assert packing.shared
        ways = {"apart": Packing(), "shared": packing}
        for task in TASKS:
            rows = list(encoded(suite, task, "train", kind))
            for number in range(rounds + 1):  # the first round warms up
                batch = [rows[(SHOTS * number + i) % len(rows)] for i in range(SHOTS)]
                for way in ways if number % 2 else reversed(ways):
                    sizes: list[int] = []

                    def noted(model: Any, batch: Any, sizes: list[int] = sizes) -> Any:
                        sizes.append(batch["input_ids"].numel())
                        return losses(model, batch)

                    kind.row_losses = noted  # type: ignore[method-assign]
                    started = time.process_time()
                    losses_of(
                        model, kind, [(slot, batch)], budget.tokens, backward=True,
                        packing=ways[way],
                    )  # fmt: skip
                    slots.zero_grad()
                    if number:
                        name = f"{task}, {way}"
                        seconds.setdefault(name, []).append(time.process_time() - started)
                        tokens.setdefault(name, []).append(sum(sizes))
    names = [f"{task}, {way}" for task in TASKS for way in ways]
    return {
        "shots": SHOTS,
        "cpu_seconds": {name: seconds[name] for name in names},
        "tokens": {name: tokens[name] for name in names},
    }
