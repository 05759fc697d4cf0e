"""The models that are compared, and what one call of each does.

Contenders: the frozen base model alone (the floor), PEFT LoRA, PEFT Poly as shipped (train mode),
and polyroute; in generation also polyroute with one task merged; on a GPU also LoRA and polyroute
compiled, and polyroute's whole step as a CUDA graph. All work on the same frozen weights.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
import transformers
from cases import Case
from measure import Call
from torch import Tensor, nn

import polyroute

TASKS = [f"task{i}" for i in range(64)]
VOCAB = 2048
REFERENCE = "lora"
TARGETS = {
    "t5": (["q", "k", "v", "o", "wi_0", "wi_1", "wo"], peft.TaskType.SEQ_2_SEQ_LM),
    "llama": (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        peft.TaskType.CAUSAL_LM,
    ),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
"""How far logits may differ, relative to the largest one."""
BACKEND = "inductor"


@dataclass
class Contender:
    """One model of a case, with its inputs and its call."""

    model: Any
    inputs: dict[str, Any]
    call: Call
    kind: str = "eager"
    """`eager`, `compiled`, or `graph`: a CUDA graph, recorded by `start`."""
    may_fail: bool = False
    """Whether an error is noted rather than raised."""


# ---------------------------------------------------------------- models


def build_base(case: Case) -> Any:
    """The frozen base model, with random weights."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": VOCAB, "tie_word_embeddings": False}
    config["use_cache"] = case.new_tokens > 0
    heads = case.attention_heads
    with torch.device(case.device):
        if case.family == "t5":
            config |= {"d_model": case.hidden, "d_kv": case.hidden // heads, "num_heads": heads}
            config |= {"num_layers": case.layers, "num_decoder_layers": case.layers}
            config |= {"d_ff": case.feed_forward, "feed_forward_proj": "gated-gelu"}
            config |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
            model: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
        else:
            config |= {"hidden_size": case.hidden, "intermediate_size": case.feed_forward}
            config |= {"num_hidden_layers": case.layers, "num_attention_heads": heads}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model = model.to(getattr(torch, case.dtype)).requires_grad_(False)
    if case.checkpointing:
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def same_weights(base: nn.Module) -> Any:
    """Modules of its own, around the very tensors of `base`."""
    tensors = (*base.parameters(), *base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def build_lora(case: Case, base: nn.Module, *, as_shipped: bool = False) -> Any:
    """PEFT LoRA. As shipped it keeps fp32 factors beside a bf16 model, which is slower."""
    targets, task_type = TARGETS[case.family]
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=1,
        init_lora_weights=False,
        target_modules=targets,
        task_type=task_type,
    )
    return peft.get_peft_model(base, config, autocast_adapter_dtype=as_shipped)


def build_poly(case: Case, base: nn.Module, skills: int, heads: int) -> Any:
    targets, task_type = TARGETS[case.family]
    config = peft.PolyConfig(
        r=case.rank,
        init_weights=False,
        n_tasks=len(TASKS),
        n_skills=skills,
        n_splits=heads,
        target_modules=targets,
        task_type=task_type,
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if name.endswith("module_logits"):  # near zero by default: all tasks would be alike
            nn.init.normal_(parameter)
    return model


def build_polyroute(case: Case, base: nn.Module, poly: Any, skills: int, heads: int) -> Any:
    """Polyroute with the skills and the routing logits of a PEFT Poly."""
    config = polyroute.MHRConfig(num_skills=skills, num_heads=heads, rank=case.rank, alpha=1.0)
    model = polyroute.attach(base, config, TASKS)
    if case.checkpointing:
        enable_checkpointing(model)
    copy_weights(poly, model)
    return model


@torch.no_grad()
def copy_weights(poly: Any, model: polyroute.RoutedModel) -> None:
    rows = []
    for i, site in enumerate(model.sites):
        layer = poly.get_submodule(f"base_model.model.{site.name}")
        skills = model.inventory.site_tensors(i)
        skills["lora_a"].copy_(layer.poly_lora_A["default"])
        skills["lora_b"].copy_(layer.poly_lora_B["default"])
        rows.append(layer.poly_router["default"].module_logits)
    for task, row in zip(TASKS, torch.stack(rows, dim=1), strict=True):
        model.routes[task] = row.reshape(-1)


def label(name: str, case: Case, skills: int, heads: int) -> str:
    """How a contender is called: with its setting, where the case has several."""
    return name if len(case.settings) == 1 else f"{name} s{skills} h{heads}"


def build_models(case: Case) -> dict[str, Any]:
    """Every contender's model; each pair of Poly and polyroute holds equal weights."""
    base = build_base(case)
    models = {"base": base, "lora": build_lora(case, same_weights(base))}
    if case.dtype != "float32":
        models["lora as shipped"] = build_lora(case, same_weights(base), as_shipped=True)
    for skills, heads in case.settings:
        poly = build_poly(case, same_weights(base), skills, heads)
        models[label("poly", case, skills, heads)] = poly
        build = partial(build_polyroute, case, poly=poly, skills=skills, heads=heads)
        models[label("polyroute", case, skills, heads)] = build(base=same_weights(base))
        if case.compiled:
            models["polyroute compiled"] = build(base=same_weights(base))
        if case.graph:
            models["polyroute graph"] = build(base=same_weights(base))
        if case.new_tokens and case.tasks == 1:  # on weights of its own, which it changes
            models["merged"] = build(base=copy.deepcopy(base))
            models["merged"].merge(TASKS[0])
    if case.compiled:
        models["lora compiled"] = build_lora(case, same_weights(base))
    if not case.new_tokens:  # something must require a gradient, or nothing would run backward
        for module in base.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == VOCAB:
                module.register_forward_hook(lambda _, __, output: output.requires_grad_())
    for model in models.values():
        model.train(not case.new_tokens)
    return models


# ---------------------------------------------------------------- calls


def build_batch(case: Case) -> dict[str, Any]:
    draw = partial(torch.randint, 3, VOCAB, generator=torch.Generator().manual_seed(1))
    ids = draw((case.batch, case.length))
    batch: dict[str, Any] = {"input_ids": ids}
    if case.new_tokens:
        batch["attention_mask"] = torch.ones_like(ids)
    elif case.family == "llama":
        batch["labels"] = ids.clone()
    else:
        batch["labels"] = draw((case.batch, max(1, case.length // 4)))
    return {name: tensor.to(case.device) for name, tensor in batch.items()}


def task_inputs(case: Case, name: str) -> dict[str, Any]:
    """How a contender is told the tasks, which alternate along the batch."""
    rows = [i % case.tasks for i in range(case.batch)]
    kind = name.partition(" ")[0]
    if kind == "poly":
        return {"task_ids": torch.tensor(rows, device=case.device)}
    return {"tasks": [TASKS[row] for row in rows]} if kind in ("polyroute", "merged") else {}


def training_step(
    model: Any,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    inputs: Mapping[str, Any],
) -> None:
    model(**inputs).loss.backward()
    if optimizer is not None:
        optimizer.step()
    for parameter in trained:
        parameter.grad = None


def build_call(case: Case, model: Any, inputs: Mapping[str, Any]) -> Call:
    """What is timed."""
    if case.new_tokens:
        length = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}
        return partial(
            model.generate, **inputs, **length, do_sample=False, pad_token_id=0, eos_token_id=1
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = None
    if case.optimizer and trained:  # fused: the fastest that torch has, for all alike
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    return partial(training_step, model, trained, optimizer, inputs)


def build_contenders(case: Case, models: Mapping[str, Any]) -> dict[str, Contender]:
    batch = build_batch(case)
    found = {}
    for name, model in models.items():
        inputs = batch | task_inputs(case, name)
        contender = Contender(model, inputs, build_call(case, model, inputs))
        if name.endswith((" compiled", " graph")):
            contender.kind = name.rpartition(" ")[2]
        # PEFT Poly forgets the tasks before backward, where checkpointed blocks run again.
        forgets = case.checkpointing and name.partition(" ")[0] == "poly"
        contender.may_fail = contender.kind != "eager" or forgets
        found[name] = contender
    return found


def start(contenders: dict[str, Contender]) -> dict[str, str]:
    """Warm up, compile and record; contenders that cannot are taken out.

    Returns:
        Why they cannot, by name.
    """
    failed = {}
    for name, contender in list(contenders.items()):
        try:
            if contender.kind == "compiled":
                contender.model.compile(backend=BACKEND)
            if contender.kind == "graph":
                contender.call = record_graph(contender)
            for _ in range(3 if contender.kind == "compiled" else 1):
                contender.call()
        except Exception as error:
            if not contender.may_fail:
                raise
            failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            del contenders[name]
            for parameter in contender.model.parameters():
                parameter.grad = None
    return failed


def record_graph(contender: Contender) -> Call:
    """Record forward and backward of a step once; a call then replays it with a single launch.

    Inputs stay where they are, and gradients appear where the recording has put them, as in any
    loop around a CUDA graph.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever is prepared once must not be part of the recording
        for _ in range(3):
            contender.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.model(**contender.inputs).loss.backward()
    return graph.replay


# ---------------------------------------------------------------- the same function


@torch.no_grad()
def check_same_function(case: Case, models: Mapping[str, Any]) -> float:
    """How far polyroute's logits are from PEFT Poly's without noise, relative to the largest logit.

    Raises:
        RuntimeError: further than rounding explains.
    """
    batch = build_batch(replace(case, new_tokens=0))
    worst = 0.0
    for skills, heads in case.settings:
        names = [label(name, case, skills, heads) for name in ("poly", "polyroute")]
        names += ["merged"] if "merged" in models else []
        expected, *found = (
            evaluate(models[name], batch | task_inputs(case, name)) for name in names
        )
        scale = float(expected.abs().max())
        worst = max(worst, *(float((f - expected).abs().max()) / scale for f in found))
    if not worst <= TOLERANCE[case.dtype]:
        raise RuntimeError(f"{case.name}: logits differ from those of PEFT Poly by {worst:.2e}")
    return worst


def evaluate(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    was_training = model.training
    logits: Tensor = model.eval()(**inputs).logits.float()
    model.train(was_training)
    return logits
