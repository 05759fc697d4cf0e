"""Time of one training step and of generation, relative to PEFT LoRA of the same rank.

    python benchmarks/step_time.py [--rounds 9] [--threads 2] [--cases t5-b16-u4 ...] [--quick]

Contenders: the frozen base model alone (the floor), PEFT LoRA, PEFT Poly as shipped (train mode),
and polyroute; in generation also polyroute with one task merged. All run in this process, in fp32,
in the order A B C D, D C B A, ..., so that a change in the machine's load meets every contender
alike. Reported are medians and quartiles of the ratios within a round. A training step is forward
and backward without an optimizer. Before anything is timed, polyroute's logits are compared with
those of PEFT Poly holding the same weights: what is timed is the same function.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyroute

RANK, HEADS, SKILLS = 4, 8, 8
TASKS = [f"task{i}" for i in range(64)]
VOCAB = 2048
REFERENCE = "lora"
WARM_UP = 1
TARGETS = {
    "t5": (["q", "k", "v", "o", "wi_0", "wi_1", "wo"], peft.TaskType.SEQ_2_SEQ_LM),
    "llama": (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        peft.TaskType.CAUSAL_LM,
    ),
}
INTRODUCTION = """\
{cpu}, {cores} cores, torch threads: {threads}; torch {torch}, transformers {transformers},
PEFT {peft}, polyroute {polyroute} at {commit}; {date}.
Rank {rank}, {heads} heads, {skills} skills, fp32.

Ratios are to PEFT LoRA of the same rank, whose column shows its time: medians (quartiles) of
{rounds} interleaved rounds; below 1 is faster. `-b` is the batch size, `-u` the number of distinct
tasks in the batch; cases named `generate` decode greedily with a cache, the others are forward and
backward. `base` has no adapter; `merged` is polyroute with the one task folded into the weights."""
COLUMNS = {
    "wall_ratio": "Wall-clock time",
    "cpu_ratio": "CPU time of the process",
    "ops": "Dispatched operations, views not counted",
    "host_syncs": "Host synchronisations",
    "saved_mb": "Kept for backward beyond the parameters, MB",
}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One model, batch and number of distinct tasks."""

    family: str
    batch: int
    tasks: int
    length: int = 64
    new_tokens: int = 0
    """0: a training step; otherwise greedy generation with a cache, after a prompt of `length`."""
    hidden: int = 512
    feed_forward: int = 1024
    layers: int = 8
    """For T5, of the encoder and of the decoder each."""

    @property
    def name(self) -> str:
        """A short name, for `--cases` and the tables."""
        size = "" if self.hidden == 512 else f"-d{self.hidden}"
        mode = "-generate" if self.new_tokens else ""
        return f"{self.family}{size}{mode}-b{self.batch}-u{self.tasks}"


def all_cases() -> list[Case]:
    models = [Case("t5", 16, 1, layers=6), Case("llama", 16, 1, feed_forward=1376, layers=8)]
    batches = [(16, 1), (16, 4), (16, 16), (8, 1), (8, 4)]
    train = [replace(model, batch=b, tasks=u) for model in models for b, u in batches]
    tiny = replace(models[1], batch=4, tasks=4, length=8, hidden=64, feed_forward=176)
    generate = [
        replace(model, batch=8, tasks=u, length=32, new_tokens=32)
        for model in models
        for u in (1, 4)
    ]
    return [*train, tiny, *generate]


def quick_cases() -> list[Case]:
    small = {"hidden": 64, "feed_forward": 128, "layers": 2, "length": 8}
    return [Case("llama", 4, 4, **small), Case("t5", 4, 1, new_tokens=4, **small)]


# ---------------------------------------------------------------- models


def build_base(case: Case) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": VOCAB, "tie_word_embeddings": False}
    if case.family == "t5":
        config |= {"d_model": case.hidden, "d_kv": case.hidden // 8, "d_ff": case.feed_forward}
        config |= {"num_layers": case.layers, "num_decoder_layers": case.layers, "num_heads": 8}
        config |= {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
        config |= {"decoder_start_token_id": 0}
        model: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    else:
        config |= {"hidden_size": case.hidden, "intermediate_size": case.feed_forward}
        config |= {"num_hidden_layers": case.layers, "num_attention_heads": 8}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    return model.requires_grad_(False).train(not case.new_tokens)


def build_models(case: Case) -> dict[str, Any]:
    """Every contender, each with a base model of its own; Poly and polyroute hold equal weights."""
    base = build_base(case)
    if not case.new_tokens:  # something must require a gradient, or nothing would run backward
        for module in base.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == VOCAB:
                module.register_forward_hook(lambda _, __, output: output.requires_grad_())
    targets, task_type = TARGETS[case.family]
    where: dict[str, Any] = {"target_modules": targets, "task_type": task_type}
    lora = peft.LoraConfig(r=RANK, lora_alpha=1, init_lora_weights=False, **where)
    sizes = {"n_tasks": len(TASKS), "n_skills": SKILLS, "n_splits": HEADS}
    poly = peft.PolyConfig(r=RANK, init_weights=False, **sizes, **where)
    config = polyroute.MHRConfig(num_skills=SKILLS, num_heads=HEADS, rank=RANK, alpha=1.0)
    models = {
        "base": base,
        "lora": peft.get_peft_model(build_base(case), lora),
        "poly": peft.get_peft_model(build_base(case), poly),
        "polyroute": polyroute.attach(build_base(case), config, TASKS),
    }
    for name, parameter in models["poly"].named_parameters():
        if name.endswith("module_logits"):  # near zero by default: all tasks would be alike
            nn.init.normal_(parameter)
    copy_weights(models["poly"], models["polyroute"])
    if case.new_tokens and case.tasks == 1:
        models["merged"] = polyroute.attach(build_base(case), config, TASKS)
        copy_weights(models["poly"], models["merged"])
        models["merged"].merge(TASKS[0])
    for model in models.values():
        model.train(not case.new_tokens)
    return models


@torch.no_grad()
def copy_weights(poly: Any, model: polyroute.RoutedModel) -> None:
    """Give polyroute the skills and the routing logits of PEFT Poly."""
    rows = []
    for i, site in enumerate(model.sites):
        layer = poly.get_submodule(f"base_model.model.{site.name}")
        skills = model.inventory.site_tensors(i)
        skills["lora_a"].copy_(layer.poly_lora_A["default"])
        skills["lora_b"].copy_(layer.poly_lora_B["default"])
        rows.append(layer.poly_router["default"].module_logits)
    for task, row in zip(TASKS, torch.stack(rows, dim=1), strict=True):
        model.routes[task] = row.reshape(-1)


def build_inputs(case: Case) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The batch, and what each contender takes besides it. Tasks alternate along the batch."""
    draw = partial(torch.randint, 3, VOCAB, generator=torch.Generator().manual_seed(1))
    ids = draw((case.batch, case.length))
    rows = [i % case.tasks for i in range(case.batch)]
    batch: dict[str, Any] = {"input_ids": ids}
    if case.new_tokens:
        batch["attention_mask"] = torch.ones_like(ids)
    elif case.family == "llama":
        batch["labels"] = ids.clone()
    else:
        batch["labels"] = draw((case.batch, case.length // 4))
    named: dict[str, Any] = {"tasks": [TASKS[row] for row in rows]}
    extra = {"poly": {"task_ids": torch.tensor(rows)}, "polyroute": named, "merged": named}
    return batch, extra


def training_step(model: Any, trained: Sequence[nn.Parameter], inputs: dict[str, Any]) -> None:
    for parameter in trained:
        parameter.grad = None
    model(**inputs).loss.backward()


def build_calls(case: Case, models: Mapping[str, Any]) -> dict[str, Call]:
    """What is timed, by contender."""
    batch, extra = build_inputs(case)
    calls: dict[str, Call] = {}
    for name, model in models.items():
        inputs = batch | extra.get(name, {})
        if case.new_tokens:
            length = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}
            calls[name] = partial(
                model.generate, **inputs, **length, do_sample=False, pad_token_id=0, eos_token_id=1
            )
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            calls[name] = partial(training_step, model, trained, inputs)
    return calls


@torch.no_grad()
def check_same_function(case: Case, models: Mapping[str, Any]) -> float:
    """How far polyroute's logits are from PEFT Poly's without noise, relative to the largest logit.

    Raises:
        RuntimeError: further than rounding explains.
    """
    batch, extra = build_inputs(replace(case, new_tokens=0))
    logits: dict[str, Tensor] = {}
    for name in {"poly", "polyroute", "merged"} & set(models):
        was_training = models[name].training
        logits[name] = models[name].eval()(**batch, **extra[name]).logits
        models[name].train(was_training)
    expected = logits.pop("poly")
    worst = max(float((values - expected).abs().max()) for values in logits.values())
    worst /= float(expected.abs().max())
    if not worst <= 1e-5:
        raise RuntimeError(f"{case.name}: logits differ from those of PEFT Poly by {worst:.2e}")
    return worst


# ---------------------------------------------------------------- measurement


class Counter(TorchDispatchMode):
    """Counts dispatched aten operations that compute something, and host synchronisations."""

    FREE = ("_unsafe_view", "empty", "new_empty", "detach", "lift_fresh", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.synchronisations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[-1]
        self.synchronisations += name == "_local_scalar_dense"
        self.operations += not func.is_view and not name.startswith(self.FREE)
        return func(*args, **(kwargs or {}))


def saved_megabytes(model: Any, inputs: dict[str, Any]) -> float:
    """What the graph keeps for backward, beyond the model's parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # a freed address could be given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    kept.clear()
    loss.backward()  # frees the graph, which the hooks would otherwise keep alive
    return sum(sizes.values()) / 2**20


def measure_figures(
    case: Case, models: Mapping[str, Any], calls: Mapping[str, Call]
) -> dict[str, dict[str, Any]]:
    """The figures that do not depend on the machine's load."""
    batch, extra = build_inputs(case)
    figures: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        with Counter() as counter:
            call()
        figures[name] = {"ops": counter.operations, "host_syncs": counter.synchronisations}
        if not case.new_tokens:
            figures[name]["saved_mb"] = saved_megabytes(models[name], batch | extra.get(name, {}))
    return figures


def interleave(calls: Mapping[str, Call], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per call, wall clock and CPU time of the process, round by round."""
    seconds: dict[str, dict[str, list[float]]] = {n: {"wall_s": [], "cpu_s": []} for n in calls}
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in list(calls) if number % 2 == 0 else reversed(list(calls)):
                wall, cpu = time.perf_counter(), time.process_time()
                calls[name]()
                seconds[name]["cpu_s"].append(time.process_time() - cpu)
                seconds[name]["wall_s"].append(time.perf_counter() - wall)
    finally:
        gc.enable()
    return seconds


def summarise(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within a round."""
    ratios = [value / other for value, other in zip(values, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    models = build_models(case)
    difference = check_same_function(case, models)
    calls = build_calls(case, models)
    figures = measure_figures(case, models, calls)
    load = os.getloadavg()[0]
    seconds = interleave(calls, rounds)
    contenders = {
        name: {
            **figures[name],
            "wall_ratio": summarise(times["wall_s"], seconds[REFERENCE]["wall_s"]),
            "cpu_ratio": summarise(times["cpu_s"], seconds[REFERENCE]["cpu_s"]),
            **times,
        }
        for name, times in seconds.items()
    }
    return {
        "name": case.name,
        **asdict(case),
        "relative_logit_difference": difference,
        "load_average": [load, os.getloadavg()[0]],
        "contenders": contenders,
    }


# ---------------------------------------------------------------- report


def describe_machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "polyroute": polyroute.__version__,
        "commit": git.stdout.strip() or None,
    }


def format_cell(contender: Mapping[str, Any], key: str, *, is_reference: bool) -> str:
    value = contender.get(key)
    if value is None:
        return "-"
    if not key.endswith("_ratio"):
        return f"{value:.1f}" if isinstance(value, float) else str(value)
    if is_reference:
        return f"{1000 * statistics.median(contender[key.replace('ratio', 's')]):.0f} ms"
    return f"{value['median']:.2f} ({value['q25']:.2f}-{value['q75']:.2f})"


def render_markdown(report: Mapping[str, Any]) -> str:
    """The tables, made from what the JSON file holds."""
    machine, settings = report["machine"], report["settings"]
    lines = ["# Step time", "", INTRODUCTION.format(**machine, **settings)]
    names = list(dict.fromkeys(name for case in report["cases"] for name in case["contenders"]))
    for key, title in COLUMNS.items():
        lines += ["", f"## {title}", "", f"| case | {' | '.join(names)} |"]
        lines.append("| --- " * (len(names) + 1) + "|")
        for case in report["cases"]:
            found = case["contenders"]
            cells = [
                format_cell(found.get(name, {}), key, is_reference=name == REFERENCE)
                for name in names
            ]
            lines.append(f"| {case['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def parse_arguments(names: Sequence[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="timed rounds per case (default 9; --quick 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=" ".join(names))
    parser.add_argument("--quick", action="store_true", help="two small cases, as a smoke test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 9
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    return arguments


def main() -> None:
    cases = {case.name: case for case in all_cases()}
    arguments = parse_arguments(list(cases))
    torch.set_num_threads(arguments.threads)
    chosen = quick_cases() if arguments.quick else [cases[n] for n in arguments.cases or cases]
    settings = {"rounds": arguments.rounds, "rank": RANK, "heads": HEADS, "skills": SKILLS}
    machine = describe_machine(arguments.threads)
    report: dict[str, Any] = {"machine": machine, "settings": settings, "cases": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(chosen, start=1):
        result = run_case(case, arguments.rounds)
        report["cases"].append(result)
        ratios = {n: round(c["wall_ratio"]["median"], 3) for n, c in result["contenders"].items()}
        print(f"[{number}/{len(chosen)}] {case.name}: {ratios}", file=sys.stderr, flush=True)
        gc.collect()
        write_atomically(arguments.out / "step_time.json", json.dumps(report, indent=1) + "\n")
        write_atomically(arguments.out / "step_time.md", render_markdown(report))


if __name__ == "__main__":
    main()
