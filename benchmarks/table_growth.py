"""What a training step, memory and files cost as the routing table grows to a million tasks.

    python benchmarks/table_growth.py [--steps 15] [--quick] [--render]

Contenders: polyroute with `model.optimizer` (row-wise), polyroute with a dense `torch.optim.AdamW`,
and PEFT Poly with the same AdamW; both dense ones use torch's fused kernel. A step is forward,
backward, clipping and the optimizer's step on a batch of 16 distinct tasks drawn anew. The cases of
a group run in this process and take turns, one step each, forward and back, so a change in the
machine's load affects all of them alike. Results go to benchmarks/results/table_growth.json after
each group; the page and the plot are made from that file (`--render` only makes them again).
"""

import argparse
import gc
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import peft
import torch
import transformers

import polyroute
from polyroute.host.files import write_json
from polyroute.routes.row_optimizer import RowAdamW
from polyroute.saved.runs import machine

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
RANK, HEADS, SKILLS, BATCH, LENGTH, VOCAB = 4, 16, 8, 16, 32, 1024
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
LAYERS = 8  # with five adapted layers each: 40 sites
SLOWEST = 20.0
MOST_BYTES = 10e9
ROW_READS = 100
LABELS = {
    "rowwise": "polyroute, row-wise",
    "dense": "polyroute, dense AdamW",
    "poly": "PEFT Poly, dense AdamW",
    "rowwise-block": "polyroute, row-wise, 1,024 numbers a row",
}
SIZES = [100, 1_000, 10_000, 100_000]
GROUPS = [
    [("rowwise", n) for n in SIZES] + [(c, n) for c in ("dense", "poly") for n in SIZES[:3]],
    [("dense", 100), ("dense", 100_000)],
    [("poly", 100), ("poly", 100_000)],
    [("rowwise-block", 100), ("rowwise-block", 1_000_000)],
]
QUICK = [[("rowwise", 100), ("rowwise", 1_000), ("dense", 100), ("poly", 100)]]

TEXT = """\
# Growth of the routing table

{cpu}, 1 thread of {cores} cores, load {load}; torch {torch}, transformers {transformers}, PEFT
{peft}. Llama-like base model, hidden size 256, 8 layers with 5 adapted layers each (40 sites);
{skills} skills, {heads} heads, rank {rank}, fp32; 16 examples of {length} tokens, of 16 distinct
tasks that are drawn anew in each step. A step is forward, backward, clipping to norm 1 and the
optimizer. A row has 40 x 16 x 8 = 5,120 numbers (20 kB). A million such rows would take 20 GB, so
at that size the layers of a block share a router (`granularity="blockwise"`). A row then has 8 x
16 x 8 = 1,024 numbers, and the comparison is with 100 rows of that width.

Times are medians of {steps} steps, or of 7 where a table is 2 GB dense or has a million rows. The
ratio is the median of the ratios to the same contender's step with 100 tasks in the same round.
CPU time is that of the process. `table` is the parameter; `trained` is what the optimizer and the
gradient hold in addition after the run. In the row-wise case these are the rows that were in a
batch, at most twice the table once every row has trained. Dense contenders stop where table,
gradient and moments pass 10 GB or a step takes longer than 20 s: 1,000,000 tasks would take
{dense_million:.0f} GB. The file of PEFT Poly also holds its skills, 3 MB. Files are on a local
disk with a warm page cache. The process used at most {peak} of resident memory.

![Step time, memory and file access against the number of tasks](table_growth.png)
"""


# ---------------------------------------------------------------- contenders


def build_base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS,
        num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def row_width(contender: str) -> int:
    return (LAYERS if contender == "rowwise-block" else len(TARGETS) * LAYERS) * HEADS * SKILLS


class Case:
    """One contender with a table of one size."""

    def __init__(self, contender: str, tasks: int) -> None:
        self.contender, self.tasks = contender, tasks
        if contender == "poly":
            config = peft.PolyConfig(
                r=RANK, n_tasks=tasks, n_skills=SKILLS, n_splits=HEADS, target_modules=TARGETS,
                task_type=peft.TaskType.CAUSAL_LM,
            )  # fmt: skip
            self.model: Any = peft.get_peft_model(build_base(), config)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer: Any = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        else:
            settings = polyroute.MHRConfig(
                num_skills=SKILLS, num_heads=HEADS, rank=RANK, target_modules=TARGETS,
                granularity="blockwise" if contender == "rowwise-block" else "finegrained",
            )  # fmt: skip
            names = [f"task {i}" for i in range(tasks)]
            self.model = polyroute.attach(build_base(), settings, names)
            assert self.model.routes.logits.shape[1] == row_width(contender)
            if contender == "dense":
                self.optimizer = torch.optim.AdamW(self.model.param_groups("full"), fused=True)
            else:
                self.optimizer = self.model.optimizer("full")
        self.model.train()
        self.random = random.Random(0)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def step(self) -> None:
        """Train on one batch, and note how long it took."""
        rows = self.random.sample(range(self.tasks), BATCH)
        ids = torch.tensor([[self.random.randrange(VOCAB) for _ in range(LENGTH)] for _ in rows])
        if self.contender == "poly":
            route: dict[str, Any] = {"task_ids": torch.tensor(rows)}
        else:
            route = {"tasks": [f"task {row}" for row in rows]}
        wall, cpu = time.perf_counter(), time.process_time()
        self.model(input_ids=ids, labels=ids, **route).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def memory(self) -> dict[str, float]:
        """Bytes of the table, and of what training holds for it besides."""
        if self.contender == "poly":
            table = [p for n, p in self.model.named_parameters() if n.endswith("module_logits")]
        else:
            table = [self.model.routes.logits]
        size = sum(p.nbytes for p in table)
        if isinstance(self.optimizer, RowAdamW):
            beside = sum(t.nbytes for t in self.optimizer._moments.values())
        else:
            moments = [self.optimizer.state[p] for p in table]
            beside = size + sum(m["exp_avg"].nbytes + m["exp_avg_sq"].nbytes for m in moments)
        return {"table_bytes": size, "trained_bytes": beside}


def fits(contender: str, tasks: int) -> bool:
    copies = 1 if contender.startswith("rowwise") else 4
    return 4 * tasks * row_width(contender) * copies < MOST_BYTES


# ---------------------------------------------------------------- measurement


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_files(case: Case, scratch: Path) -> dict[str, float]:
    """Saving, the size on disk, and what one row takes there; the page cache is warm."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        folder = Path(place)
        before = time.process_time()
        found = {"save_s": timed(lambda: case.model.save_pretrained(folder))}
        found["save_cpu_s"] = time.process_time() - before
        names = ("routes-*",) if case.contender != "poly" else ("adapter_model*",)
        files = [path for name in names for path in folder.rglob(name)]
        found["file_bytes"] = sum(path.stat().st_size for path in files)
        if case.contender == "poly":
            return found
        draw = random.Random(1)
        chosen = [f"task {draw.randrange(case.tasks)}" for _ in range(ROW_READS)]
        reads = [timed(lambda n=n: polyroute.SavedRoutes(folder).read(n)) for n in chosen]
        found["read_row_s"] = statistics.median(reads)
        row = case.model.routes["task 0"]
        table = polyroute.SavedRoutes(folder)
        adds = [timed(lambda i=i: table.add(f"new {i}", row)) for i in range(9)]
        found["add_row_s"] = statistics.median(adds)
        some = list(dict.fromkeys(chosen))[:BATCH]
        base = build_base()
        found["load_16_s"] = timed(lambda: polyroute.from_pretrained(base, folder, tasks=some))
        return found


def summarise(case: Case, reference: Case | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "contender": case.contender,
        "tasks": case.tasks,
        "wall_s": statistics.median(case.wall),
        "cpu_s": statistics.median(case.cpu),
        **case.memory(),
    }
    if reference is not None:
        for kind in ("wall", "cpu"):
            pairs = zip(getattr(case, kind), getattr(reference, kind), strict=True)
            found[f"{kind}_ratio"] = statistics.median(own / other for own, other in pairs)
    return found


def run_group(
    group: Sequence[tuple[str, int]], steps: int, scratch: Path, *, with_files: bool = True
) -> list[dict[str, Any]]:
    cases = [Case(*entry) for entry in group if fits(*entry)]
    for case in cases:
        case.step()
    slow = [case for case in cases if case.cpu[0] > SLOWEST]
    cases = [case for case in cases if case not in slow]
    for case in cases:
        case.step()
        case.wall.clear(), case.cpu.clear()
    gc.collect()
    gc.disable()
    for number in range(steps):
        for case in cases if number % 2 == 0 else reversed(cases):
            case.step()
    gc.enable()
    results = []
    for case in cases:
        least = min(c.tasks for c in cases if c.contender == case.contender)
        reference = next(c for c in cases if (c.contender, c.tasks) == (case.contender, least))
        result = summarise(case, reference)
        if with_files and case.contender != "dense":  # whose files are the same
            result |= measure_files(case, scratch)
        results.append(result)
        print(
            {k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}, flush=True
        )
    return results


def run(groups: Sequence[Any], steps: int, scratch: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "machine": machine(),
        "steps": steps,
        "load_average": [os.getloadavg()[0]],
        "results": [],
    }
    for group in groups:
        known = {(r["contender"], r["tasks"]) for r in report["results"]}
        # A dense step on a large table takes seconds, and varies little.
        found = run_group(group, steps if len(group) > 2 else min(steps, 7), scratch)
        report["results"] += [r for r in found if (r["contender"], r["tasks"]) not in known]
        report["load_average"].append(os.getloadavg()[0])
        report["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / "table_growth.json", report)
        gc.collect()
    return report


# ---------------------------------------------------------------- the page and the plot


def size(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def milliseconds(number: float | None) -> str:
    if number is None:
        return ""
    return f"{1000 * number:,.1f} ms" if number < 0.1 else f"{1000 * number:,.0f} ms"


def render(report: dict[str, Any]) -> None:
    made_on = report["machine"]
    load = " to ".join(f"{f(report['load_average']):.1f}" for f in (min, max))
    text = TEXT.format(
        cpu=made_on["cpu"], cores=made_on["cores"], load=load, skills=SKILLS, heads=HEADS,
        rank=RANK, length=LENGTH, steps=report["steps"],
        peak=size(report["peak_resident_bytes"]),
        dense_million=4 * 4 * 1e6 * row_width("dense") / 1e9,
        **{name: made_on["versions"][name] for name in ("torch", "transformers", "peft")},
    )  # fmt: skip
    head = [
        "contender", "tasks", "step", "CPU time", "ratio", "CPU ratio", "table", "trained",
        "file", "save", "save, CPU", "read a row", "add a row", "load 16 tasks",
    ]  # fmt: skip
    lines = [text, "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    order = list(LABELS)
    for r in sorted(report["results"], key=lambda r: (order.index(r["contender"]), r["tasks"])):
        cells = [
            LABELS[r["contender"]], f"{r['tasks']:,}", milliseconds(r["wall_s"]),
            milliseconds(r["cpu_s"]), f"{r['wall_ratio']:.2f}", f"{r['cpu_ratio']:.2f}",
            size(r["table_bytes"]), size(r["trained_bytes"]), size(r.get("file_bytes")),
            *(milliseconds(r.get(f"{k}_s")) for k in
              ("save", "save_cpu", "read_row", "add_row", "load_16")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    (RESULTS / "table_growth.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(report, RESULTS / "table_growth.png")


def draw(report: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 5.4), layout="constrained")
    styles = {"rowwise": "o-", "dense": "s--", "poly": "^:", "rowwise-block": "o-."}
    for contender, label in LABELS.items():
        found = sorted(
            (r for r in report["results"] if r["contender"] == contender), key=lambda r: r["tasks"]
        )
        tasks = [r["tasks"] for r in found]
        style = styles[contender]
        axes[0].plot(tasks, [r["cpu_s"] for r in found], style, label=label)
        memory = [(r["table_bytes"] + r["trained_bytes"]) / 1e6 for r in found]
        axes[1].plot(tasks, memory, style, label=label)
        if contender.startswith("rowwise"):
            kind = "" if contender == "rowwise" else ", 1,024 numbers"
            for key, what, marker in (
                ("save_s", "save all", "o"), ("add_row_s", "add a row", "s"),
                ("read_row_s", "read a row", "^"),
            ):  # fmt: skip
                line = "-" if contender == "rowwise" else "-."
                axes[2].plot(tasks, [r[key] for r in found], marker + line, label=what + kind)
    for axis, title, unit in zip(
        axes,
        ("A training step, CPU time", "Table, gradient and moments", "Files"),
        ("seconds", "MB", "seconds"),
        strict=True,
    ):
        axis.set(xscale="log", yscale="log", xlabel="tasks", ylabel=unit, title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="timed steps per case")
    parser.add_argument("--quick", action="store_true", help="four small cases, as a smoke test")
    parser.add_argument("--render", action="store_true", help="only make page and plot again")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    if arguments.render:
        report = json.loads((RESULTS / "table_growth.json").read_text(encoding="utf-8"))
    elif arguments.quick:
        torch.set_num_threads(1)
        for group in QUICK:
            run_group(group, 3, arguments.scratch)
        return
    else:
        report = run(GROUPS, arguments.steps, arguments.scratch)
    render(report)


if __name__ == "__main__":
    main()
