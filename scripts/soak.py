"""Use one process hard: its memory and handles must stay, and no answer may be another task's.

    python scripts/soak.py --minutes 30

At the same time, on the demo's base model:

- 16 threads and 200 coroutines generate for tasks of one inventory, each answer compared with that
  of its task alone;
- one thread attaches an inventory to a base model of its own, adapts it to a task, exports the
  LoRA and takes the inventory off again, over and over;
- three threads read rows of a table of 100,000 tasks, and one writes rows, each of one number, so
  that half a row would show.

Memory (resident, in MB), open handles and threads are written down every ten seconds. They are flat
if the median of the last fifth is at most 5 %, or 3, above that of the fifth after a minute.
"""

import argparse
import asyncio
import copy
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import polyroute as pr
from polyroute.demo.suite import TASKS, write_suite
from polyroute.host.files import write_json
from polyroute.host.memory import Trim
from polyroute.study.examples import encoded

THREADS, COROUTINES, READERS = 16, 200, 3
ROWS = 100_000
WORDS = 4
"""Tokens of an answer."""
PAUSE = 10.0
"""Seconds between looks at the process."""
FLAT, FEW = 0.05, 3


@dataclass
class Soak:
    """What all workers share.

    Attributes:
        done: how often each kind of work was done.
        wrong: sentences about what came out otherwise than it had to.
    """

    until: float
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def goes_on(self) -> bool:
        """Whether there is time left, and nothing went wrong."""
        return time.monotonic() < self.until and not self.wrong

    def worker(self, work: Callable[[random.Random], None], seed: int) -> threading.Thread:
        """A thread that repeats some work."""

        def run() -> None:
            chance = random.Random(seed)
            try:
                while self.goes_on():
                    work(chance)
            except Exception as error:
                self.wrong.append(f"{work.__name__}: {type(error).__name__}: {error}")

        return threading.Thread(target=run)


def inventory(base: Any, tasks: list[str]) -> pr.RoutedModel:
    """A fresh inventory whose tasks answer differently."""
    config = pr.MHRConfig(num_skills=8, num_heads=4, rank=2, route_spread=3.0)
    model = pr.attach(base, config, tasks).eval()
    with torch.no_grad():
        for parameter in model.inventory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass
class Answers:
    """One model that many use at once."""

    soak: Soak
    model: pr.RoutedModel
    prompts: list[torch.Tensor]

    def __post_init__(self) -> None:
        self.expected = {
            (task, place): self.generate(place, task)
            for task in self.model.tasks
            for place in range(len(self.prompts))
        }
        assert len({str(answer.tolist()) for answer in self.expected.values()}) > len(self.prompts)

    @torch.no_grad()
    def generate(self, place: int, task: str | None = None) -> torch.Tensor:
        """An answer to one prompt, of the task or of the route that is open."""
        prompt = self.prompts[place]
        return self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), tasks=None if task is None else [task],
            max_new_tokens=WORDS, min_new_tokens=WORDS, do_sample=False,
        )  # fmt: skip

    def one(self, chance: random.Random) -> tuple[str, int]:
        """A task and a prompt, at random."""
        return chance.choice(self.model.tasks), chance.randrange(len(self.prompts))

    def compare(self, kind: str, task: str, place: int, answer: torch.Tensor) -> None:
        """Note an answer that is not that of its task."""
        if not torch.equal(answer, self.expected[task, place]):
            self.soak.wrong.append(f"{kind}: the answer for {task} is another one's")
        self.soak.done[kind] += 1

    def in_a_thread(self, chance: random.Random) -> None:
        """Generate once."""
        task, place = self.one(chance)
        self.compare("answers in threads", task, place, self.generate(place, task))

    def in_coroutines(self, _: random.Random) -> None:
        """Let many coroutines generate, each within a block that others interrupt."""

        async def work(seed: int) -> None:
            chance = random.Random(seed)
            while self.soak.goes_on():
                task, place = self.one(chance)
                with self.model.route([task]):
                    await asyncio.sleep(chance.random())
                    answer = self.generate(place)
                    await asyncio.sleep(0)
                self.compare("answers in coroutines", task, place, answer)

        async def together() -> None:
            await asyncio.gather(*(work(seed) for seed in range(COROUTINES)))

        asyncio.run(together())


@dataclass
class Cycles:
    """A base model that gets and loses inventories."""

    soak: Soak
    base: Any
    kind: Any
    rows: Any
    folder: Path

    def cycle(self, chance: random.Random) -> None:
        """Attach, adapt, export and unload once."""
        model = inventory(self.base, ["one", "two"])
        phase = chance.choice(["z", "mu", "full"])
        [result] = pr.adapt_many(
            model, {"new": self.rows}, kind=self.kind, phase=phase, shots=8, steps=2, batch_size=4
        )
        result.export_peft(self.folder / "lora")
        self.base = model.unload()
        self.soak.done["inventories"] += 1


@dataclass
class Table:
    """A large table on disk, with readers and one writer."""

    soak: Soak
    folder: Path

    def __post_init__(self) -> None:
        base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        names = [f"user {number}" for number in range(ROWS)]
        config = pr.MHRConfig(num_skills=2, num_heads=2, rank=1, target_modules=["0"])
        model = pr.attach(base, config, names)
        with torch.no_grad():
            model.routes.logits.fill_(0.5)
        model.save_pretrained(self.folder)

    def read(self, chance: random.Random) -> None:
        """Read a row, whole."""
        row = pr.SavedRoutes(self.folder).read(f"user {chance.randrange(ROWS)}")
        if len(row.unique()) != 1:
            self.soak.wrong.append(f"half a row was read: {row.flatten().tolist()}")
        self.soak.done["rows read"] += 1

    def write(self, chance: random.Random) -> None:
        """Write a row, and read it back."""
        table, name = pr.SavedRoutes(self.folder), f"user {chance.randrange(ROWS)}"
        values = torch.full(table.shape, chance.random())
        table.write(name, values)
        if not torch.equal(table.read(name), values):
            self.soak.wrong.append(f"what was written for {name} was not read again")
        self.soak.done["rows written"] += 1


def watched(soak: Soak) -> list[dict[str, float]]:
    """What the process holds, every ten seconds until the end."""
    own, begin, trim = psutil.Process(), time.monotonic(), Trim()
    found: list[dict[str, float]] = []
    while soak.goes_on():
        time.sleep(min(PAUSE, max(0.0, soak.until - time.monotonic())))
        trim.if_due()
        found.append(
            {
                "second": round(time.monotonic() - begin),
                "megabytes": round(own.memory_info().rss / 1e6, 1),
                "handles": own.num_fds(),
                "threads": own.num_threads(),
            }
        )
        print(found[-1], dict(soak.done), flush=True)
    return found


def medians(looks: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Of the fifth of the looks after the first minute, and of the last fifth."""
    later = [look[name] for look in looks if look["second"] > 60] or [looks[-1][name]]
    part = max(1, len(later) // 5)
    return statistics.median(later[:part]), statistics.median(later[-part:])


def main() -> int:
    """Run all of it; 1 if something went wrong or grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, help="a JSON file for what was seen")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base, tokenizer = pr.load_base("demo")
    kind = pr.kind_of(base, tokenizer, max_input=64, max_target=16)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_suite(folder / "suite", train=50, validation=2, test=2)
        task = next(one.name for one in TASKS if one.role == "held-out")
        rows = encoded(pr.open_suite(folder / "suite"), task, "train", kind)
        prompts = [torch.tensor([rows[number]["prompt_ids"]]) for number in range(4)]
        soak = Soak(time.monotonic() + 60 * options.minutes)
        own = copy.deepcopy(base)
        answers = Answers(soak, inventory(base, [f"task {n}" for n in range(50)]), prompts)
        cycles = Cycles(soak, own, kind, rows, folder)
        table = Table(soak, folder / "table")
        jobs = [answers.in_a_thread] * THREADS + [answers.in_coroutines, cycles.cycle]
        jobs += [table.read] * READERS + [table.write]
        workers = [soak.worker(job, seed) for seed, job in enumerate(jobs)]
        for worker in workers:
            worker.start()
        looks = watched(soak)
        for worker in workers:
            worker.join()
    names = ("megabytes", "handles", "threads") if looks else ()
    held = {name: medians(looks, name) for name in names}
    seen = {"done": dict(soak.done), "wrong": soak.wrong, "held": held, "looks": looks}
    if options.out:
        write_json(options.out, seen)
    print({key: value for key, value in seen.items() if key != "looks"})
    grew = any(last > max(first * (1 + FLAT), first + FEW) for first, last in held.values())
    return int(bool(soak.wrong) or grew)


if __name__ == "__main__":
    sys.exit(main())
