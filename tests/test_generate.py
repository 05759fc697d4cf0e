from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TASKS, batch, llama, routed, rows, t5
from torch import Tensor, nn

from polyroute import InputError, RoutedModel

Build = Callable[[], nn.Module]
ORDER = ["birch", "amber", "dune", "birch"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"num_beams": 2, "length_penalty": 0.2, "early_stopping": True},
]


def prompts(size: int = 4, length: int = 5) -> dict[str, Tensor]:
    inputs = batch(llama(), size, length)
    inputs.pop("labels")
    return inputs


def generate(model: RoutedModel, inputs: dict[str, Tensor], tasks: Any, **options: Any) -> Tensor:
    """Eight new tokens for every sequence, so that batches of one have the same length."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    output: Tensor = model.generate(**inputs, tasks=tasks, **options)
    return output


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("build", [t5, llama])
def test_generation_for_several_tasks_equals_each_task_alone(
    build: Build, options: dict[str, Any]
) -> None:
    model, inputs = routed(build(), num_heads=4), prompts()
    alone = [generate(model, rows(inputs, i), task, **options) for i, task in enumerate(ORDER)]
    assert torch.equal(generate(model, inputs, ORDER, **options), torch.cat(alone))
    assert not torch.equal(generate(model, inputs, "cedar", **options), torch.cat(alone))


@pytest.mark.parametrize("build", [t5, llama])
def test_sampled_sequences_belong_to_the_task_of_their_prompt(build: Build) -> None:
    model, inputs = routed(build(), num_heads=4), prompts()
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3}
    nearly_greedy = generate(model, inputs, ORDER, **options, temperature=1e-4)
    greedy = generate(model, inputs, ORDER)
    assert torch.equal(nearly_greedy, greedy.repeat_interleave(3, 0))
    same = prompts(1)["input_ids"].expand(4, -1).contiguous()
    tasks = ["amber"] * 4
    torch.manual_seed(5)
    by_list = generate(model, {"input_ids": same}, tasks, **options)
    torch.manual_seed(5)
    assert torch.equal(by_list, generate(model, {"input_ids": same}, "amber", **options))
    assert by_list.shape[0] == 12


@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padding_does_not_change_what_is_generated(num_beams: int) -> None:
    model, inputs = routed(llama(), num_heads=4), prompts(2)
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[0, :2] = mask[0, :2] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    both = generate(model, padded, ["dune", "amber"], num_beams=num_beams)
    first = generate(model, {"input_ids": ids[:1, 2:]}, "dune", num_beams=num_beams)
    second = generate(model, rows(inputs, 1), "amber", num_beams=num_beams)
    assert torch.equal(both[:1, 2:], first)
    assert torch.equal(both[1:], second)


@pytest.mark.parametrize("build", [t5, llama])
def test_sixteen_tasks_generate_in_one_batch(build: Build) -> None:
    names = tuple(f"task{i}" for i in range(16))
    model, inputs = routed(build(), names, num_heads=4), prompts(16)
    alone = [generate(model, rows(inputs, i), name) for i, name in enumerate(names)]
    assert torch.equal(generate(model, inputs, list(names)), torch.cat(alone))


@pytest.mark.parametrize("build", [t5, llama])
def test_an_open_route_holds_for_generate(build: Build) -> None:
    model, inputs = routed(build(), num_heads=4), prompts()
    with model.route(ORDER):
        inside = generate(model, inputs, None, num_beams=2)
    assert torch.equal(inside, generate(model, inputs, ORDER, num_beams=2))
    with pytest.raises(InputError, match="no task is routed"):
        generate(model, inputs, None)


@pytest.mark.parametrize("build", [t5, llama])
def test_a_change_between_two_generations_in_one_block_is_seen(build: Build) -> None:
    model, inputs = routed(build(), num_heads=4), prompts()
    with model.route("amber"):
        before = generate(model, inputs, None)
        with torch.no_grad():
            for parameter in model.inventory.parameters():
                parameter.mul_(-1.5)
        after = generate(model, inputs, None)
    assert torch.equal(after, generate(model, inputs, "amber"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("build", [t5, llama])
def test_a_failed_generation_leaves_no_route_behind(build: Build) -> None:
    model, inputs = routed(build(), num_heads=4), prompts()
    with pytest.raises(InputError, match="3 tasks were given for a batch of 4"):
        generate(model, inputs, list(TASKS[:3]))
    with pytest.raises(InputError, match="no task is routed"):
        generate(model, inputs, None)


@pytest.mark.parametrize("build", [t5, llama])
def test_generation_under_autocast_is_that_of_each_task(build: Build) -> None:
    model, inputs = routed(build(), num_heads=4), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        alone = [generate(model, rows(inputs, i), task) for i, task in enumerate(ORDER)]
        assert torch.equal(generate(model, inputs, ORDER), torch.cat(alone))
