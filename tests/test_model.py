import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import TASKS, batch, bert, gpt2, llama, relative_error, routed, rows, shake, stack, t5
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyroute import InputError, MHRConfig, RoutedModel, attach
from polyroute.routes.inventory import Inventory
from polyroute.routes.weights import skill_weights

BUILDERS = [t5, llama, gpt2, bert]
Build = Callable[[], nn.Module]
TOLERANCE = 2e-6  # fp32, relative to the largest entry


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def one_by_one(model: RoutedModel, inputs: dict[str, Tensor], tasks: list[str]) -> Tensor:
    outputs = [model(**rows(inputs, i), tasks=task).logits for i, task in enumerate(tasks)]
    return torch.cat(outputs)


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("method", ["mhr", "poly", "private", "shared"])
@pytest.mark.parametrize("build", BUILDERS)
@torch.no_grad()
def test_a_mixed_batch_equals_its_rows_one_by_one(build: Build, method: Any, adapter: Any) -> None:
    model = routed(build().double(), method=method, adapter=adapter, rank=2)
    tasks = ["birch", "amber", "dune", "birch"]
    inputs = batch(model.base_model)
    expected = one_by_one(model, inputs, tasks)
    assert relative_error(model(**inputs, tasks=tasks).logits, expected) < 1e-12
    if method != "shared":
        assert relative_error(model(**inputs, tasks="birch").logits, expected) > 1e-3


@pytest.mark.parametrize("build", BUILDERS)
@torch.no_grad()
def test_sixteen_different_tasks_fit_in_a_batch(build: Build) -> None:
    names = tuple(f"task{i}" for i in range(16))
    model = routed(build(), names, num_heads=4)
    inputs, order = batch(model.base_model, 16), [f"task{i * 7 % 16}" for i in range(16)]
    actual = model(**inputs, tasks=order).logits
    assert relative_error(actual, one_by_one(model, inputs, order)) < TOLERANCE


@torch.no_grad()
def test_the_order_of_a_batch_does_not_matter() -> None:
    model, inputs = routed(llama(), num_heads=4), batch(llama())
    order, tasks = [2, 0, 3, 1], ["amber", "birch", "birch", "dune"]
    expected = model(**inputs, tasks=tasks).logits[order]
    actual = model(**rows(inputs, *order), tasks=[tasks[i] for i in order]).logits
    assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("tasks", [[0, 1, 0, 1], [2, 2, 3, 3], [3, 1, 1, 3]], ids=str)
@torch.no_grad()
def test_tasks_that_repeat_evenly_keep_their_places(tasks: list[int]) -> None:
    model, inputs = routed(llama(), num_heads=4), batch(llama())
    expected = one_by_one(model, inputs, [TASKS[task] for task in tasks])
    assert relative_error(model(**inputs, tasks=tasks).logits, expected) < TOLERANCE


@torch.no_grad()
def test_left_padding_changes_no_example() -> None:
    model, inputs = routed(llama(), num_heads=4), batch(llama(), 2)
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[0, :2] = mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions, tasks=TASKS[:2])
    alone = model(input_ids=ids[:1, 2:], tasks="amber")
    assert relative_error(padded.logits[:1, 2:], alone.logits) < TOLERANCE


@torch.no_grad()
def test_every_way_of_naming_the_tasks_means_the_same() -> None:
    model, inputs = routed(llama(), num_heads=4), batch(llama(), 2)
    expected = model(**inputs, tasks=["birch", "dune"]).logits
    ways: list[Any] = [("birch", "dune"), [1, 3], torch.tensor([1, 3]), ["birch", 3]]
    assert all(torch.equal(model(**inputs, tasks=way).logits, expected) for way in ways)
    single = model(**inputs, tasks="dune").logits
    for one in (3, torch.tensor(3), ["dune", "dune"]):
        assert torch.equal(model(**inputs, tasks=one).logits, single)


@torch.no_grad()
def test_mu_can_stand_beside_tasks_in_a_batch() -> None:
    for method in ("mhr", "private"):
        model, inputs = routed(llama(), method=method), batch(llama(), 3)
        tasks = ["dune", "mu", "amber"]
        actual = model(**inputs, tasks=tasks).logits
        assert relative_error(actual, one_by_one(model, inputs, tasks)) < TOLERANCE


@torch.no_grad()
def test_none_is_the_base_model_alone() -> None:
    base, inputs = llama(), batch(llama())
    expected = base(**inputs).logits
    model = routed(base)
    with model.route("amber"), model.route(None):
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_a_batch_of_one_is_routed_by_a_list_or_a_name() -> None:
    model, inputs = routed(t5(), num_heads=4), batch(t5(), 1)
    assert torch.equal(
        model(**inputs, tasks=["cedar"]).logits, model(**inputs, tasks="cedar").logits
    )


@pytest.mark.parametrize("build", [t5, llama])
@pytest.mark.parametrize("tasks", ["cedar", ["birch", "amber", "dune", "birch"]])
def test_bf16_autocast_is_within_the_error_of_bf16(build: Build, tasks: Any) -> None:
    model = routed(build(), num_heads=4)
    inputs = batch(model.base_model)
    exact = model(**inputs, tasks=tasks)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**inputs, tasks=tasks)
    assert relative_error(rough.logits, exact.logits) < 0.05
    rough.loss.backward()
    lows = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    exact.loss.backward()
    highs = [p.grad for p in model.parameters() if p.grad is not None]
    pairs = zip(lows, highs, strict=True)
    assert all(float((a - b).norm() / b.norm()) < 0.1 and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("settings", [{}, {"adapter": "ia3"}, {"combine": "output"}])
@pytest.mark.parametrize("tasks", ["cedar", ["birch", "amber", "dune", "birch"]])
def test_autocast_leaves_a_float64_model_as_it_is(tasks: Any, settings: dict[str, Any]) -> None:
    model = routed(t5().double(), num_heads=4, **settings)
    inputs = batch(model.base_model)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**inputs, tasks=tasks)
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.learned())])
    assert all(relative_error(*pair) < 1e-6 for pair in zip(*found, strict=True))


@pytest.mark.parametrize("tasks", ["cedar", ["birch", "amber", "dune", "birch"]])
def test_a_bf16_base_keeps_fp32_skills(tasks: Any) -> None:
    exact, low = routed(llama(), num_heads=4), routed(llama().bfloat16(), num_heads=4)
    inputs = batch(exact.base_model)
    output = low(**inputs, tasks=tasks)
    assert {p.dtype for p in low.inventory.parameters()} == {torch.float32}
    assert output.logits.dtype == torch.bfloat16
    assert relative_error(output.logits, exact(**inputs, tasks=tasks).logits) < 0.05


# ------------------------------------------------------------------ the context


@torch.no_grad()
def test_routes_nest_and_close_after_an_error() -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    outer, inner = (model(x, tasks=t) for t in ("amber", "dune"))
    with model.route("amber"):
        with model.route("dune"):
            assert torch.equal(model(x), inner)
            with pytest.raises(KeyError), model.route("cedar"):
                raise KeyError
            assert torch.equal(model(x), inner)
        assert torch.equal(model(x), outer)
        assert torch.equal(model(x, tasks="dune"), inner)
        assert torch.equal(model(x), outer)
    with pytest.raises(InputError, match="no task is routed"):
        model(x)


@torch.no_grad()
def test_one_route_object_can_be_entered_again_and_within_itself() -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    scope, expected = model.route("amber"), model(x, tasks="amber")
    for _ in range(2):
        with scope, scope:
            assert torch.equal(model(x), expected)
    with pytest.raises(InputError, match="no task is routed"):
        model(x)


def test_a_forward_without_a_route_says_what_to_do() -> None:
    for method in ("mhr", "poly", "private"):
        model = routed(stack(), ("only",), method=method)
        with pytest.raises(InputError, match=r"with model\.route\(tasks\).*'mu' for the average"):
            model(torch.randn(2, 8))


def test_a_shared_adapter_needs_no_route() -> None:
    model, x = routed(stack(), method="shared"), torch.randn(2, 8)
    assert torch.equal(model(x), model(x, tasks="amber"))


@torch.no_grad()
def test_threads_that_share_a_model_see_their_own_tasks_only() -> None:
    model, inputs = routed(llama(), num_heads=4), batch(llama(), 2)
    mixed = ["dune", "cedar"]
    choices: list[Any] = ["amber", mixed]
    expected = [model(**inputs, tasks=choice).logits for choice in choices]
    wrong: list[Any] = []
    together = threading.Barrier(2)

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                together.wait(30)
                with model.route(choices[i]):
                    if not torch.equal(model(**inputs).logits, expected[i]):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not together.broken


def test_a_route_holds_in_its_own_thread_only() -> None:
    model, errors = routed(stack()), []

    def work() -> None:
        try:
            model(torch.randn(2, 8))
        except InputError as error:
            errors.append(str(error))

    with model.route("amber"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "no task is routed" in errors[0]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("ambre", "unknown task 'ambre': did you mean 'amber'"),
        (["amber", "brich"], "unknown task 'brich': did you mean 'birch'"),
        (-1, "task id -1 is out of range: there are 4 tasks"),
        ([0, -1], "task id -1 is out of range"),
        (4, "task id 4 is out of range"),
        (torch.tensor([0, -1]), "task id -1 is out of range"),
        (torch.tensor([0.0, 1.0]), "not a torch.float32 tensor"),
        (torch.tensor([True, False]), "not a torch.bool tensor"),
        (torch.zeros(2, 1, dtype=torch.long), r"of shape \[2, 1\]"),
        (torch.zeros(0, dtype=torch.long), "no tasks given"),
        ([], "no tasks given: name one task per example"),
        (True, "not True"),
        ([0, 1.5], "not 1.5"),
        (1.0, "one per example, not a float"),
        ({"amber"}, "one per example, not a set"),
        ({"amber": 1}, "one per example, not a dict"),
        (b"amber", "one per example, not a bytes"),
        (np.array([0.0, 1.0]), "not 0.0"),
        (np.array(["amber", "brich"]), "unknown task 'brich'"),
    ],
    ids=str,
)
def test_tasks_that_do_not_exist_are_refused(tasks: Any, message: str) -> None:
    model = routed(stack())
    with pytest.raises(InputError, match=message):
        model.route(tasks)
    with pytest.raises(InputError, match=message):
        model(torch.randn(2, 8), tasks=tasks)
    assert model(torch.randn(2, 8), tasks="amber").shape == (2, 16)


def test_arrays_and_columns_of_names_are_lists_of_names() -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    expected = model(x, tasks=["cedar", "amber"])
    for tasks in (
        np.array(["cedar", "amber"]),
        np.array(["cedar", "amber"], dtype=object),
        pd.Series(["cedar", "amber"], index=[7, 3]),
        np.array([2, 0]),
        (name for name in ("cedar", "amber")),
    ):
        assert torch.equal(model(x, tasks=tasks), expected)
    assert torch.equal(model(x, tasks=np.array("cedar")), model(x, tasks="cedar"))


def test_what_is_no_model_config_or_list_of_tasks_is_refused() -> None:
    base: Any = stack()
    config: Any = {"rank": 2}
    with pytest.raises(InputError, match="base_model must be a torch module, not a str"):
        attach("t5", MHRConfig(), ["amber"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="config must be an MHRConfig, not a dict"):
        attach(base, config, ["amber"])
    with pytest.raises(InputError, match="tasks must be a list of names, not None"):
        attach(base, MHRConfig(), None)  # type: ignore[arg-type]
    model = routed(base)
    with pytest.raises(InputError, match="not the single string 'ab'"):
        model.keep_tasks("ab")
    model.keep_tasks(name for name in ("dune", "amber"))  # type: ignore[arg-type]
    assert model.tasks == ("dune", "amber")


def test_an_unloaded_model_says_so(tmp_path: Any) -> None:
    model = routed(stack())
    base = model.unload()
    assert model.unload() is base
    for use in (
        lambda: model(torch.randn(2, 8), tasks="amber"),
        lambda: model(torch.randn(2, 8)),
        lambda: model.route("amber"),
        lambda: model.merge("amber"),
        lambda: model.unmerge(),
        lambda: model.save_pretrained(tmp_path / "x"),
        lambda: model.load_adapter(tmp_path),
        lambda: model.export_peft("amber", tmp_path / "x"),
    ):
        with pytest.raises(InputError, match="this routed model was unloaded"):
            use()
    assert not (tmp_path / "x").exists()
    again = routed(base)
    model.unload()  # does not take the new inventory out
    assert again.routed_layers[0] is base.up


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_batch_that_the_tasks_do_not_fit_is_refused(count: int) -> None:
    model, inputs = routed(llama()), batch(llama(), 3)
    with pytest.raises(InputError, match=f"{count} tasks were given for a batch of 3 examples"):
        model(**inputs, tasks=TASKS[:count])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("amber", "tasks must be a list of names, not the single string 'amber'"),
        (["amber", "birch", "amber"], "task 'amber' is given twice"),
        (["mu"], "'mu' is reserved"),
        ([""], "non-empty string"),
        ([3], "non-empty string, not 3"),
        (["a\x00"], r"has the character U\+0000"),
        (["\u00e9", "e\u0301"], "how their characters are composed"),
    ],
    ids=str,
)
def test_attaching_with_impossible_tasks_leaves_the_base_alone(tasks: Any, message: str) -> None:
    base = stack()
    with pytest.raises(InputError, match=message):
        attach(base, MHRConfig(), tasks)
    assert all(p.requires_grad for p in base.parameters())
    assert type(base.up) is nn.Linear


def test_attaching_twice_is_refused() -> None:
    model = routed(llama())
    for base in (model.base_model, model):
        with pytest.raises(InputError, match=r"carries an inventory already; call unload\(\)"):
            attach(base, MHRConfig(), ["x"])


def test_an_expert_that_sees_some_tokens_takes_one_task_at_a_time() -> None:
    base = nn.Sequential()
    base.add_module("experts", nn.ModuleList([nn.Linear(8, 8)]))
    base.forward = lambda x: base.experts[0](x)  # type: ignore[method-assign]
    model, x = routed(base), torch.randn(4, 8)
    assert model(x, tasks="amber").shape == (4, 8)
    with pytest.raises(InputError, match=r"'experts\.0' is an expert"):
        model(x, tasks=["amber", "birch"] * 2)


# ------------------------------------------------------------------ noise


def test_noise_is_drawn_for_every_example_in_training_only() -> None:
    model = routed(stack(), num_heads=4, gate="relaxed_bernoulli")
    x = torch.randn(1, 8).expand(6, 8)
    noisy = model.train()(x, tasks=["amber"] * 6)
    assert len({tuple(row.tolist()) for row in noisy}) == 6
    still = model.eval()(x, tasks=["amber"] * 6)
    torch.testing.assert_close(still, still[:1].expand(6, -1))
    plain = routed(stack(), num_heads=4)(x, tasks="amber")
    assert relative_error(still, plain) < TOLERANCE


@pytest.mark.parametrize("noise", [{"gate": "relaxed_bernoulli"}, {"logit_dropout": 0.5}], ids=str)
def test_noise_in_training_is_drawn_afresh_also_without_gradients(noise: dict[str, Any]) -> None:
    model, x = routed(stack(), num_heads=4, **noise).train(), torch.randn(3, 8)
    with torch.no_grad():
        draws = [model(x, tasks=["amber", "birch", "cedar"]) for _ in range(2)]
    assert not torch.equal(*draws)


@torch.no_grad()
def test_noisy_gates_are_mixed_row_by_row() -> None:
    model, x = routed(stack(), num_heads=4, gate="relaxed_bernoulli").train(), torch.randn(3, 8)
    torch.manual_seed(9)
    actual = model(x, tasks=["amber", "birch", "amber"])
    torch.manual_seed(9)
    z = torch.stack([model.routes[row] for row in (0, 1, 0)])
    w = skill_weights(z, model.adapter_config, training=True)
    # With as many heads as skills, this variant's weights are the gates: any weights can be set.
    plain = routed(stack(), num_heads=4, normalization="average_correction")
    for i in range(3):
        plain.routes["cedar"] = torch.logit(w[i].double())
        alone = plain(x[i : i + 1], tasks="cedar")
        assert relative_error(actual[i : i + 1], alone) < 1e-5


# ------------------------------------------------------------------ the cache


@pytest.fixture
def mixes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that factors are mixed."""
    calls: list[int] = []
    original = Inventory.mix

    def mix(self: Inventory, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Inventory, "mix", mix)
    return calls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_factors_are_mixed_once(mixes: list[int], context: Any) -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    with context():
        for _ in range(3):
            model(x, tasks=["amber", "birch"])
        assert len(mixes) == 1
        model(x, tasks=["birch", "amber"])
        assert len(mixes) == 2
        model(x, tasks=["amber", "birch"])
        assert len(mixes) == 2


def test_what_was_mixed_in_inference_mode_can_be_trained_through() -> None:
    model, x = routed(stack()), torch.randn(2, 8, requires_grad=True)
    model.requires_grad_(False)
    with torch.inference_mode():
        model(x.detach(), tasks="amber")
    model(x, tasks="amber").sum().backward()
    assert x.grad is not None


def test_with_gradients_factors_are_mixed_once_a_forward(mixes: list[int]) -> None:
    model, inputs = routed(t5(), num_heads=4), batch(t5())
    for _ in range(2):
        model(**inputs, tasks=["amber", "birch", "amber", "dune"]).loss.backward()
    assert len(mixes) == 2


def change_by_optimizer(model: RoutedModel) -> None:
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.1))
    model(torch.randn(2, 8), tasks="amber").square().sum().backward()
    optimizer.step()


def change_by_load(model: RoutedModel) -> None:
    other = routed(stack(), seed=8)
    model.load_state_dict(other.state_dict())


def change_by_row(model: RoutedModel) -> None:
    model.routes["amber"] = torch.randn(3, 8, 4)


def change_by_tasks(model: RoutedModel) -> None:
    model.keep_tasks(["dune", "amber"])
    model.keep_tasks(["amber"])
    model.routes["amber"] = torch.randn(3, 8, 4)


def change_by_phase(model: RoutedModel) -> None:
    model.set_phase("random")


def change_by_annealing(model: RoutedModel) -> None:
    model.mixer.anneal_progress = 0.5


def change_behind_the_back_of_autograd(model: RoutedModel) -> None:
    for parameter in model.inventory.parameters():
        parameter.data.mul_(2)
    model.eval()


@pytest.mark.parametrize(
    "change",
    [change_by_optimizer, change_by_load, change_by_row, change_by_tasks, change_by_phase,
     change_by_annealing, change_behind_the_back_of_autograd],
)  # fmt: skip
def test_factors_are_mixed_again_after_any_change(
    mixes: list[int], change: Callable[[RoutedModel], None]
) -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    with torch.no_grad(), model.route("amber"):
        before = model(x)
        with torch.enable_grad():
            change(model)
        del mixes[:]
        after = model(x)
        assert len(mixes) == 1
        fresh = copy.deepcopy(model)
        fresh.mixer._cache.clear()
        assert torch.equal(after, fresh(x, tasks="amber"))
    assert not torch.equal(before, after)


def test_a_new_task_is_mixed_although_the_old_ones_were_kept(mixes: list[int]) -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    with torch.no_grad():
        model(x, tasks="amber")
        model.add_task("elm", "amber")
        assert torch.equal(model(x, tasks="elm"), model(x, tasks="amber"))
        model.routes["elm"] = -model.routes["elm"]
        assert not torch.equal(model(x, tasks="elm"), model(x, tasks="amber"))


@torch.no_grad()
def test_a_part_called_on_its_own_never_uses_stale_factors() -> None:
    model, ids = routed(t5(), num_heads=4), batch(t5())["input_ids"]
    encoder = model.get_encoder()
    with model.route("amber"):
        before = encoder(ids).last_hidden_state
        shake(model, seed=5)
        after = encoder(ids).last_hidden_state
    with model.route("amber"):
        assert torch.equal(after, encoder(ids).last_hidden_state)
    assert not torch.equal(before, after)


@torch.no_grad()
def test_a_part_called_after_the_model_has_its_own_route() -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    with model.route("birch"):
        expected = model.base_model.up(x)
    model(x, tasks="amber")
    with model.route("birch"):
        assert torch.equal(model.base_model.up(x), expected)


def test_training_then_evaluating_in_one_block_never_uses_stale_factors() -> None:
    model, x = routed(stack()), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.param_groups(lr=0.05, route_lr=0.05))
    with model.route(["amber", "birch", "amber", "dune"]):
        for _ in range(3):
            with torch.no_grad():
                model.eval()(x)
            model.train()(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                kept = model.eval()(x)
            torch.testing.assert_close(kept, model(x).detach())


# ------------------------------------------------------------------ the object


@torch.no_grad()
def test_a_copy_and_a_pickle_are_models_of_their_own() -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    expected = model(x, tasks="amber")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, tasks="amber"), expected)
        shake(other, seed=6)
        assert not torch.equal(other(x, tasks="amber"), expected)
        with pytest.raises(InputError, match="no task is routed"):
            other(x)
    assert torch.equal(model(x, tasks="amber"), expected)


def test_the_host_keeps_its_state_dict_keys_and_attributes() -> None:
    base = llama()
    keys, weights = list(base.state_dict()), {k: v.clone() for k, v in base.state_dict().items()}
    model = routed(base)
    assert list(model.base_model.state_dict()) == keys
    model.base_model.load_state_dict(weights)
    assert model.config is base.config
    assert base.model.layers[0].mlp.up_proj.in_features == 32
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_base_parameters_are_frozen_and_unchanged_after_a_step() -> None:
    model, inputs = routed(llama(), num_heads=4), batch(llama())
    before = {k: v.clone() for k, v in model.base_model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**inputs, tasks=list(TASKS)).loss.backward()
    optimizer.step()
    assert not any(p.requires_grad for p in model.base_model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.base_model.state_dict().items())
    learned = [*model.inventory.parameters(), *model.routes.parameters()]
    assert all(p.grad is not None and bool(p.grad.any()) for p in learned)


def test_only_the_tasks_of_the_batch_get_a_gradient() -> None:
    model = routed(stack(), num_heads=4)
    model(torch.randn(2, 8), tasks=["dune", "birch"]).sum().backward()
    assert [bool(row.any()) for row in model.routes.logits.grad] == [False, True, False, True]


# ------------------------------------------------------------------ cost


def operators(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> list[str]:
    with OperatorCounter() as counter:
        model(**inputs, **kwargs).loss.backward()
    return counter.names


@pytest.mark.parametrize("tasks", ["amber", ["amber", "birch", "amber", "dune"]])
@pytest.mark.parametrize("gate", ["sigmoid", "relaxed_bernoulli"])
def test_a_training_step_never_waits_for_the_device(tasks: Any, gate: Any) -> None:
    model, inputs = routed(llama(), num_heads=4, gate=gate).train(), batch(llama())
    inputs.pop("attention_mask")  # the base model itself looks at its values
    assert "aten::_local_scalar_dense" not in operators(model, inputs, tasks=tasks)


def test_a_step_of_one_task_takes_no_more_operators_a_layer_than_plain_lora() -> None:
    peft = pytest.importorskip("peft")
    counts: dict[str, list[int]] = {"ours": [], "peft": []}
    for layers in (1, 3):
        inputs = batch(llama())
        ours = routed(llama(layers=layers), num_heads=4).train()
        counts["ours"].append(len(operators(ours, inputs, tasks="amber")))
        names = sorted({s.name.rsplit(".", 1)[-1] for s in ours.sites})
        config = peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(llama(layers=layers), config).train()
        counts["peft"].append(len(operators(theirs, inputs)))
    per_layer = {name: (three - one) / 2 / 7 for name, (one, three) in counts.items()}
    assert per_layer["ours"] <= per_layer["peft"], per_layer


def test_tasks_without_an_order_are_refused() -> None:
    with pytest.raises(InputError, match="must be a list of names"):
        attach(stack(), MHRConfig(num_heads=1), tasks={"amber", "birch"})
