"""Serving many tasks at once, against one merged task, PEFT's mixed batches and single requests.

    python benchmarks/serving.py [--cases throughput rows learn memory] [--threads 1]

`throughput`: 1, 8 and 32 clients each send one request after the other; every request asks for 32
tokens after its prompt, a real one of its task. Together they ask each of 32 tasks equally often,
so one client does the same work as many. Contenders: the server, with requests of different tasks
at every moment; the same server with one task merged into the base weights; and PEFT's `generate`
with `adapter_names`, on a batch of one request of each client, with the same tasks exported. The
first two take turns, and PEFT follows. `rows` is what a task costs that is not in memory. `learn`
adds a task from 16 examples over HTTP. `memory` is that of the server with 1,000 and with 100,000
tasks in its folder.

`results/serving.json` keeps all, case by case; a case that is not run stays as it is there.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import STATUS

import polyroute as pr
from polyroute.data.open import open_suite
from polyroute.host.files import write_json
from polyroute.kinds.choose import kind_of
from polyroute.saved.rows import begin_routes
from polyroute.saved.runs import machine
from polyroute.saved.shards import Shard, shard_of, shard_paths
from polyroute.serving.answers import Limits
from polyroute.serving.requests import Generation
from polyroute.serving.service import ModelService, ServedRun, make_service
from polyroute.study.examples import encoded

PATH = Path(__file__).parent / "results" / "serving.json"
RUN = Path(__file__).parents[1] / "inventories" / "smollm2" / "grouped-s0"
CLIENTS = (32, 8, 1)
NEW = 32
"""Tokens of every answer."""
TURNS = 2
"""Requests of each client where there are as many clients as tasks."""
NEVER = 3
"""A special token of SmolLM2 that it does not write, in place of its end token."""
OURS, MERGED, PEFT = "32 tasks", "one merged task", "PEFT, adapter_names"


@dataclass
class Measured:
    """What clients saw."""

    seconds: float
    tokens: int
    latencies: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, float]:
        """Numbers of one round."""
        ordered = sorted(self.latencies)
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "p50": statistics.median(ordered),
            "p95": ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        }


@dataclass
class Work:
    """What clients ask: a prompt of each task."""

    tasks: Sequence[str]
    prompts: Mapping[str, list[int]]

    def turns(self, count: int) -> list[list[str]]:
        """The tasks that so many clients ask in each of their turns, all different within one."""
        asked = list(self.tasks) * max(1, TURNS * count // len(self.tasks))
        return [asked[first : first + count] for first in range(0, len(asked), count)]

    @classmethod
    def of(cls, kind: Any, data: str, tasks: Sequence[str]) -> "Work":
        """The first test prompt of each task."""
        suite = open_suite(data)
        prompts = {
            task: list(encoded(suite, task, "test", kind)[0]["prompt_ids"]) for task in tasks
        }
        return cls(tasks, prompts)


async def clients(service: ModelService, work: Work, count: int, *, task: str = "") -> Measured:
    """So many clients, with requests of different tasks, or of one task for the same prompts."""
    latencies: list[float] = []

    async def client(number: int) -> int:
        tokens = 0
        for turn in work.turns(count):
            own, started = turn[number], time.perf_counter()
            given = Generation(
                task=task or own, prompt_ids=work.prompts[own], max_tokens=NEW, temperature=0.0
            )
            async for piece in service.answer(given):
                tokens += len(piece.tokens)
            latencies.append(time.perf_counter() - started)
        return tokens

    started = time.perf_counter()
    total = sum(await asyncio.gather(*(client(number) for number in range(count))))
    return Measured(time.perf_counter() - started, total, latencies)


def loaded() -> tuple[Any, Any]:
    """SmolLM2 and its kind, in bfloat16."""
    base, tokenizer = pr.load_base("smollm2", dtype="bfloat16")
    return base, kind_of(base, tokenizer, max_input=256, max_target=64)


def tiny() -> tuple[Any, Any]:
    """A model of three million parameters, most of them the embeddings, with the same tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = pr.load_base("smollm2", dtype="bfloat16")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    return base, kind_of(base, tokenizer, max_input=256, max_target=64)


Loader = Callable[[], tuple[Any, Any]]
SETUPS: Mapping[str, tuple[Loader, Mapping[str, Any]]] = {
    "a tiny model, all linear layers": (tiny, {}),
    "SmolLM2, all linear layers": (loaded, {}),
    "SmolLM2, queries and values": (loaded, {"target_modules": ["q_proj", "v_proj"]}),
}
"""A model, and settings of an inventory."""


def random_run(folder: Path, load: Loader, **settings: Any) -> Path:
    """A run with the tasks of `RUN` and random skills, as costly as a trained one."""
    base, _ = load()
    config = pr.MHRConfig(num_skills=8, num_heads=8, rank=4, **settings)
    model = pr.attach(base, config, pr.SavedRoutes(RUN).names())
    model.set_phase("random")
    model.save_pretrained(folder)
    return folder


def opened(run: Path = RUN, load: Loader = loaded) -> ModelService:
    """The service of a run, whose answers end at their length alone."""
    base, kind = load()
    service = make_service(
        ServedRun(name=run.name, run=run, tasks_dir=None, limits=Limits()), base, kind
    )
    service.engine.ends = {NEVER}  # type: ignore[union-attr]
    return service


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and latencies, contenders in turn; setups that are left out stay."""
    found = dict(kept("throughput").get("setups", {}))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, (load, settings) in SETUPS.items():
            if name in (options.setups or SETUPS):
                print(name, flush=True)
                is_trained = load is loaded and not settings
                run = RUN if is_trained else random_run(place / name, load, **settings)
                found[name] = compared(options, run, load)
                keep("throughput", {"setups": found, "new_tokens": NEW})
    return {"setups": found, "new_tokens": NEW}


def compared(options: argparse.Namespace, run: Path, load: Loader) -> dict[str, Any]:
    """By the number of clients, rounds of what each contender measured."""
    kind, work, found = by_servers(options, run, load)  # which have their memory for themselves
    with tempfile.TemporaryDirectory() as folder:
        by_peft = peft_batches(kind, work, Path(folder), run, load)
        for count in CLIENTS:
            for one in found[str(count)]:
                one[PEFT] = by_peft(count).to_dict()
                print(count, one[PEFT], flush=True)
    return found


def by_servers(
    options: argparse.Namespace, run: Path, load: Loader
) -> tuple[Any, Work, dict[str, list[dict[str, Any]]]]:
    """The kind of the model, the work, and what the servers measured, by the number of clients."""
    ours, merged = opened(run, load), opened(run, load)
    names = list(pr.SavedRoutes(run).names())[: max(CLIENTS)]
    work, found = Work.of(ours.kind, options.data, names), dict[str, list[dict[str, Any]]]()

    async def measure() -> None:
        await ours.start()
        await merged.start()
        held = merged.engine.places.hold(names[0])
        merged.model.merge(merged.model.tasks[held.route])
        contenders: dict[str, Callable[[int], Any]] = {
            OURS: lambda n: clients(ours, work, n),
            MERGED: lambda n: clients(merged, work, n, task=names[0]),
        }
        for contender in contenders.values():
            await contender(max(CLIENTS))  # warm
        for count in CLIENTS:
            rounds: list[dict[str, Any]] = []
            # A single client takes as long as all others together, and asks 32 times.
            for number in range(options.rounds if count > 1 else 1):
                order = list(contenders)[:: 1 if number % 2 == 0 else -1]
                seen = {name: await contenders[name](count) for name in order}
                rounds.append({name: one.to_dict() for name, one in seen.items()})
                print(count, rounds[-1], flush=True)
            found[str(count)] = rounds
        await asyncio.to_thread(ours.stop)
        await asyncio.to_thread(merged.stop)

    asyncio.run(measure())
    return ours.kind, work, found


def peft_batches(
    kind: Any, work: Work, folder: Path, run: Path, load: Loader
) -> Callable[[int], Measured]:
    """PEFT's `generate` on a batch of so many tasks, as a user would."""
    from peft import PeftModel

    base, _ = load()
    routed = pr.from_pretrained(base, run, tasks=list(work.tasks))
    for number, task in enumerate(work.tasks):
        routed.export_peft(task, folder / str(number))
    base = routed.unload()
    model: Any = PeftModel.from_pretrained(base, folder / "0", adapter_name="0")
    for number in range(1, len(work.tasks)):
        model.load_adapter(folder / str(number), adapter_name=str(number))
    model.eval()

    def generate(count: int) -> Measured:
        found = Measured(0.0, 0)
        for turn in work.turns(count):
            batch = kind.tokenizer.pad(
                {"input_ids": [work.prompts[task] for task in turn]}, padding=True,
                padding_side="left", return_tensors="pt",
            )  # fmt: skip
            started = time.perf_counter()
            with torch.no_grad():
                out = model.generate(
                    **batch, adapter_names=[str(work.tasks.index(task)) for task in turn],
                    max_new_tokens=NEW, do_sample=False, eos_token_id=NEVER, pad_token_id=0,
                )  # fmt: skip
            seconds = time.perf_counter() - started
            found.seconds += seconds
            found.tokens += count * (out.shape[1] - batch["input_ids"].shape[1])
            found.latencies += [seconds] * count
        return found

    return generate


def rows(options: argparse.Namespace) -> dict[str, Any]:
    """What a task costs that is not in memory."""
    service = opened()
    names = pr.SavedRoutes(RUN).names()
    cold, warm = [], []
    for _ in range(20):
        for name in names:
            started = time.perf_counter()
            held = service.engine.places.hold(name)
            cold.append(time.perf_counter() - started)
            held.release()
            started = time.perf_counter()
            service.engine.places.hold(name).release()
            warm.append(time.perf_counter() - started)
            service.engine.places.forget(name)
    return {"cold": statistics.median(cold), "warm": statistics.median(warm)}


@contextmanager
def server(*arguments: str) -> Iterator[tuple[int, int]]:
    """`polyroute serve` in a process of its own: its port and its process id."""
    program = [sys.executable, "-m", "polyroute", "serve", str(RUN), "--port", "0", *arguments]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(program, stdout=log, stderr=log)
        try:
            found = None
            while found is None and process.poll() is None:
                time.sleep(0.1)
                text = Path(log.name).read_text(encoding="utf-8")
                found = re.search(r"http://127\.0\.0\.1:(\d+)", text)
            assert found is not None, text
            yield int(found[1]), process.pid
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """The seconds from 16 examples to the first answer as the new task."""
    import httpx

    suite = open_suite(options.data)
    task = "ag_news" if "ag_news" in suite.tasks else suite.tasks[0]
    keys = ("instruction", "input", "target", "choices")
    examples = [
        {key: row[key] for key in keys if row[key] is not None}
        for row in suite.split(task, "train").select(range(16))
    ]
    seconds = []
    with tempfile.TemporaryDirectory() as folder, server("--tasks-dir", folder) as (port, _):
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=600)
        for number in range(options.rounds):
            name, started = f"new {number}", time.perf_counter()
            client.post("/tasks", json={"name": name, "examples": examples}).raise_for_status()
            status = ""
            while status not in ("done", "failed"):
                time.sleep(0.1)
                status = client.get(f"/tasks/{name}").json()["job"]["status"]
            assert status == "done"
            asked = {"model": name, "prompt": "A prompt.", "max_tokens": 1}
            client.post("/completions", json=asked).raise_for_status()
            seconds.append(time.perf_counter() - started)
            print(seconds, flush=True)
        client.close()
    return {"task": task, "examples": 16, "seconds": seconds}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """The memory of the server with few and with many tasks in its folder, after it used many."""
    import httpx

    found: dict[str, Any] = {}
    shape = pr.SavedRoutes(RUN).shape
    for count in (1_000, 100_000):
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            folder = Path(scratch) / "tasks"
            write_tasks(folder, count, shape)
            with server("--tasks-dir", str(folder)) as (port, pid):
                client = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=600)
                before, waited = megabytes(pid), []
                for number in range(400):
                    name, started = f"user {number * (count // 400)}", time.perf_counter()
                    asked = {"model": name, "prompt": "A prompt.", "max_tokens": 1}
                    client.post("/completions", json=asked).raise_for_status()
                    waited.append(time.perf_counter() - started)
                after, request = megabytes(pid), statistics.median(waited)
                client.close()
            found[str(count)] = {"start": before, "after": after, "request": request}
            print(count, found[str(count)], flush=True)
    return found


def write_tasks(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """A folder of tasks with random rows, written shard by shard."""
    begin_routes(folder, RUN)
    paths = shard_paths(folder, 256)
    members: list[list[int]] = [[] for _ in paths]
    for number in range(count):
        members[shard_of(f"user {number}", len(paths))].append(number)
    identity = json.loads((folder / "polyroute.json").read_text())["id"]
    width = shape[0] * shape[1] * shape[2]
    for path, numbers in zip(paths, members, strict=True):
        names = [f"user {number}" for number in numbers]
        Shard(names, torch.tensor(numbers), torch.randn(len(numbers), width), identity).write(path)


def megabytes(pid: int) -> float:
    """The memory of a process that is its own, without pages of files."""
    text = Path(str(STATUS).replace("self", str(pid))).read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


CASES: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    case.__name__: case for case in (throughput, rows, learn, memory)
}


def keep(case: str, measured: Mapping[str, Any]) -> None:
    """Write what a case measured, beside what others did."""
    write_json(PATH, {**_content(), case: {"measured": measured, "machine": machine()}})


def kept(case: str) -> Mapping[str, Any]:
    """What a case measured before."""
    found: Mapping[str, Any] = _content().get(case, {}).get("measured", {})
    return found


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--setups", nargs="+", choices=SETUPS, help="of throughput, all otherwise")
    parser.add_argument("--data", default="../shared/suite")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--scratch", help="folder for 6 GB of rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    for case in options.cases:
        measured = CASES[case](options)
        keep(case, measured)
        print(case, json.dumps(measured)[:2000], flush=True)


if __name__ == "__main__":
    main()
