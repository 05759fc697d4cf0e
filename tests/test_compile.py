from typing import Any

import pytest
import torch
from models import batch, llama, relative_error, routed
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from polyroute import RoutedModel

TOLERANCE = 2e-6
ONE = ["amber", "dune", "cedar", ["birch"] * 4]
SEVERAL = [
    ["birch", "amber", "dune", "cedar"],
    ["cedar", "cedar", "amber", "birch"],
    [0, 3, 3, 3],
    ["mu", "amber", "mu", "dune"],
]


def step(model: RoutedModel, inputs: dict[str, Any], tasks: Any) -> list[torch.Tensor]:
    output = model(**inputs, tasks=tasks)
    output.loss.backward()
    found = [output.logits, *[p.grad for p in model.parameters() if p.grad is not None]]
    model.zero_grad()
    return found


@pytest.mark.parametrize("choices", [ONE, SEVERAL], ids=["one task", "several tasks"])
def test_changing_tasks_share_one_graph_without_breaks(choices: list[Any]) -> None:
    torch._dynamo.reset()
    plain, compiled = (routed(llama(), num_heads=4) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    inputs = batch(plain.base_model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tasks in choices:
            pairs = zip(step(compiled, inputs, tasks), step(plain, inputs, tasks), strict=True)
            assert all(relative_error(a, b) < TOLERANCE for a, b in pairs)
    assert counter.frame_count == 1


def test_evaluation_compiles_to_one_graph_and_sees_changed_skills() -> None:
    torch._dynamo.reset()
    model, counter = routed(llama(), num_heads=4), CompileCounterWithBackend("aot_eager")
    inputs = batch(model.base_model)
    expected = [model(**inputs, tasks=t).logits.detach() for t in SEVERAL[:2]]
    model.compile(backend=counter, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tasks, logits in zip(SEVERAL[:2], expected, strict=True):
            assert relative_error(model(**inputs, tasks=tasks).logits, logits) < TOLERANCE
        for parameter in model.inventory.parameters():
            parameter.mul_(2)
        changed = model(**inputs, tasks=SEVERAL[0]).logits
    assert counter.frame_count == 1
    assert relative_error(changed, expected[0]) > 1e-2


def test_generation_after_compiling_gives_the_same_tokens() -> None:
    torch._dynamo.reset()
    model, inputs = routed(llama(layers=1), num_heads=4), batch(llama())
    options = {"max_new_tokens": 2, "do_sample": False, "tasks": SEVERAL[0]}
    expected = model.generate(inputs["input_ids"], **options)
    model.compile(backend="eager")
    assert torch.equal(model.generate(inputs["input_ids"], **options), expected)


def test_decoding_with_a_static_cache_compiles_twice_whatever_the_tasks() -> None:
    torch._dynamo.reset()
    model, counter = routed(llama(layers=1), num_heads=4), CompileCounterWithBackend("eager")
    ids = batch(model.base_model)["input_ids"]

    @torch.no_grad()
    def decode(tasks: list[str]) -> list[torch.Tensor]:
        cache = StaticCache(config=model.base_model.config, max_cache_len=12)
        tokens, logits = ids, []
        for _ in range(3):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, tasks=tasks)
            logits.append(output.logits[:, -1])
            tokens = logits[-1].argmax(-1, keepdim=True)
        return logits

    choices = [SEVERAL[0], SEVERAL[1], SEVERAL[3]]
    expected = [decode(tasks) for tasks in choices]
    model.compile(backend=counter, fullgraph=True)
    for tasks, logits in zip(choices, expected, strict=True):
        pairs = zip(decode(tasks), logits, strict=True)
        assert all(relative_error(a, b) < TOLERANCE for a, b in pairs)
    assert counter.frame_count == 2  # the prompt, and one token
