from typing import Any

import pytest
import torch
from models import TASKS, batch, llama, routed, stack
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Adafactor, get_linear_schedule_with_warmup

from polyroute import InputError, MHRConfig, RoutedModel, attach


def state(model: RoutedModel) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def changed(model: RoutedModel, optimizer: Optimizer, tasks: Any = TASKS) -> set[str]:
    """Take a step and tell which tensors are not bit for bit what they were."""
    before = state(model)
    model(torch.randn(len(tasks), 8), tasks=list(tasks)).square().sum().backward()
    optimizer.step()
    after = state(model)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def learned(model: RoutedModel, *parts: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.split(".")[0] in parts}


def test_full_trains_all_skills_and_the_table() -> None:
    model = routed(stack(), num_heads=4)
    optimizer = torch.optim.SGD(model.param_groups("full"))
    assert changed(model, optimizer) == learned(model, "inventory", "routes")
    counts = model.counts()
    assert model.num_trainable() == counts["inventory"] + counts["routing_table"]


def test_z_trains_the_new_rows_only() -> None:
    model = routed(stack(), num_heads=4)
    model.add_task("elm")
    model.keep_tasks(["elm"])
    optimizer = torch.optim.SGD(model.param_groups("z"))
    assert model.num_trainable() == model.counts()["new_task_z"] == 3 * 4 * 4
    assert changed(model, optimizer, ["elm"]) == {"routes.logits"}


def test_mu_is_one_lora_without_any_router() -> None:
    model = routed(stack(), num_heads=4, rank=2)
    optimizer = torch.optim.SGD(model.param_groups("mu"))
    assert model.num_trainable() == 2 * 3 * (8 + 16) == model.counts()["one_adapter"]
    assert changed(model, optimizer) == learned(model, "inventory")
    assert not any("logits" in name for name in model.state_dict())
    with pytest.raises(InputError, match="no routing logits"):
        _ = model.routes["amber"]


def test_mu_uncollapsed_is_the_same_function_with_all_copies() -> None:
    single, copies = routed(stack(), num_heads=4), routed(stack(), num_heads=4)
    x = torch.randn(5, 8)
    single.set_phase("mu")
    copies.set_phase("mu-uncollapsed")
    torch.testing.assert_close(single(x, tasks="amber"), copies(x, tasks="birch"))
    assert copies.num_trainable() == 4 * single.num_trainable()
    norms = []
    for model in (single, copies):
        model(x, tasks="amber").square().sum().backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.inventory.parameters()]))
    torch.testing.assert_close(norms[1], norms[0] / 4**0.5)  # 1/sqrt(K)


def test_plain_steps_move_the_mean_of_the_copies_k_times_less() -> None:
    single, copies = routed(stack(), num_heads=4), routed(stack(), num_heads=4)
    x = torch.randn(5, 8)
    for model, rate in ((single, 0.1), (copies, 0.4)):
        optimizer = torch.optim.SGD(model.param_groups(
            "mu" if model is single else "mu-uncollapsed", lr=rate))  # fmt: skip
        model(x, tasks="mu").square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(single(x, tasks="mu"), copies(x, tasks="mu"))


def test_random_keeps_nothing_of_the_old_skills_and_routes() -> None:
    model = routed(stack(), num_heads=4)
    before = state(model)
    model.set_phase("random")
    after = state(model)
    kept = {n for n in after if torch.equal(before[n], after[n])}
    assert kept == {n for n in after if n.startswith("base_model.")} | {"routes.tasks"}
    assert all(bool((after[n] == 0).all()) for n in after if "lora_b" in n)
    assert float(after["routes.logits"].abs().max()) <= 1e-3
    assert model.num_trainable() == model.counts()["inventory"] + model.counts()["routing_table"]


def test_phases_may_follow_each_other() -> None:
    model = routed(stack(), num_heads=4)
    for phase, parts in (("z", ["routes"]), ("full", ["inventory", "routes"]), ("z", ["routes"])):
        optimizer = torch.optim.SGD(model.param_groups(phase))
        assert changed(model, optimizer) == learned(model, *parts)


@pytest.mark.parametrize("method", ["shared", "private"])
def test_phase_z_is_refused_where_nothing_is_routed(method: Any) -> None:
    model = routed(stack(), method=method)
    with pytest.raises(InputError, match=f"method '{method}' has none here"):
        model.set_phase("z")


def test_impossible_phases_and_rates_are_refused_before_anything_changes() -> None:
    model = routed(stack(), num_heads=4)
    before = state(model)
    for kwargs, message in (
        ({"phase": "mu2"}, "unknown phase 'mu2': did you mean 'mu'"),
        ({"phase": "random", "lr": 0.0}, "lr must be positive, not 0.0"),
        ({"phase": "random", "lr": float("nan")}, "lr must be a finite number, not nan"),
        ({"phase": "mu", "route_lr": float("inf")}, "route_lr must be a finite number"),
        ({"phase": "mu", "weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"phase": "mu", "route_lr": -1.0}, "route_lr must be positive, not -1.0"),
        ({"phase": "mu", "weight_decay": -0.1}, "weight_decay must not be negative"),
    ):
        with pytest.raises(InputError, match=message):
            model.param_groups(**kwargs)  # type: ignore[arg-type]
    after = state(model)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_table_without_tasks_has_nothing_to_train_in_z() -> None:
    model = routed(stack())
    model.keep_tasks([])
    with pytest.raises(InputError, match="there are none: add a task"):
        model.set_phase("z")
    model.add_task("elm")
    model.set_phase("z")
    assert model.num_trainable() == model.counts()["new_task_z"]


@torch.no_grad()
@pytest.mark.parametrize("method", ["mhr", "poly", "private", "shared"])
def test_adding_a_task_changes_no_skill_and_no_other_task(method: Any) -> None:
    model, x = routed(stack(), method=method), torch.randn(4, 8)
    expected = model(x, tasks=list(TASKS))
    model.add_task("elm", "birch")
    model.add_task("fir")
    assert model.tasks == (*TASKS, "elm", "fir")
    torch.testing.assert_close(model(x, tasks=list(TASKS)), expected)
    assert torch.equal(model(x, tasks="elm"), model(x, tasks="birch"))


@torch.no_grad()
@pytest.mark.parametrize("method", ["mhr", "private"])
def test_a_fresh_task_starts_near_the_average(method: Any) -> None:
    model, x = routed(stack(), method=method), torch.randn(4, 8)
    average = model(x, tasks="mu")
    model.add_task("elm")
    torch.testing.assert_close(model(x, tasks="elm"), average, rtol=0.01, atol=0.01)


def test_a_task_may_start_from_given_logits() -> None:
    model, z = routed(stack(), num_heads=4), torch.randn(3, 4, 4)
    assert model.add_task("elm", z) == 4
    assert torch.equal(model.routes["elm"], z)
    for name, init, message in (
        ("amber", "uniform", "'amber' is given twice"),
        ("mu", "uniform", "reserved"),
        ("fir", "oak", "unknown task 'oak'"),
        ("fir", torch.zeros(2), "a routing row has shape"),
    ):
        with pytest.raises(InputError, match=message):
            model.add_task(name, init)
    assert model.tasks == (*TASKS, "elm")
    with pytest.raises(InputError, match="method 'shared' have no routing logits"):
        routed(stack(), method="shared").add_task("elm", z)


@torch.no_grad()
@pytest.mark.parametrize("method", ["mhr", "private", "shared"])
def test_kept_tasks_compute_what_they_did(method: Any) -> None:
    model, x = routed(stack(), method=method), torch.randn(4, 8)
    expected = model(x, tasks=["dune", "birch"] * 2)
    model.keep_tasks(["dune", "birch"])
    assert model.tasks == ("dune", "birch")
    assert torch.equal(model(x, tasks=["dune", "birch"] * 2), expected)
    with pytest.raises(InputError, match="unknown task 'amber'"):
        model.route("amber")


def test_every_group_states_its_rate_and_its_decay() -> None:
    model = routed(stack())
    groups = model.param_groups(lr=0.01, route_lr=0.2, weight_decay=0.3)
    optimizer = torch.optim.AdamW(groups, lr=7.0, weight_decay=7.0)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("skills", 0.01, 0.3),
        ("routes", 0.2, 0.0),
    ]
    assert [len(g["params"]) for g in groups] == [4, 1]
    defaults = {g["name"]: (g["lr"], g["weight_decay"]) for g in model.param_groups()}
    assert defaults == {"skills": (1e-3, 0.0), "routes": (0.1, 0.0)}


def test_decay_pulls_logits_to_the_uniform_mixture_only_where_asked() -> None:
    for decay in (0.0, 0.01):
        model = routed(stack())
        before = model.routes["amber"]
        groups = model.param_groups("z", route_lr=0.1, route_weight_decay=decay)
        model.routes.logits.grad = torch.zeros_like(model.routes.logits)
        torch.optim.AdamW(groups).step()
        torch.testing.assert_close(model.routes["amber"], before * (1 - 0.1 * decay))


@pytest.mark.parametrize(("scaled", "skill", "logit"), [(True, 3e-6, 1e-4), (False, 3e-3, 0.1)])
def test_the_first_steps_of_adafactor_have_the_published_sizes(
    scaled: bool, skill: float, logit: float
) -> None:
    model = attach(stack(), MHRConfig(num_heads=4), TASKS)
    optimizer = Adafactor(
        model.param_groups(lr=3e-3, route_lr=0.1),
        scale_parameter=scaled,
        relative_step=False,
        warmup_init=False,
    )
    zero, table = model.inventory.lora_b["8x16"], model.routes.logits
    before = table.detach().clone()
    for parameter in (zero, table):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full_like(zero, -skill), rtol=1e-4, atol=0)
    step = before - table.detach()
    torch.testing.assert_close(step, torch.full_like(step, logit), rtol=1e-3, atol=0)


def test_warm_up_is_linear_from_zero_and_back_for_every_group() -> None:
    optimizer = torch.optim.SGD(routed(stack()).param_groups(lr=0.01, route_lr=0.5))
    schedule = get_linear_schedule_with_warmup(optimizer, 4, 20)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    for step, factor in ((0, 0), (2, 0.5), (4, 1), (12, 0.5), (20, 0)):
        assert rates[step] == pytest.approx([0.01 * factor, 0.5 * factor])


@pytest.mark.parametrize("phase", ["full", "z", "mu", "mu-uncollapsed", "random"])
def test_a_language_model_learns_in_every_phase(phase: Any) -> None:
    model, inputs = routed(llama(layers=1), num_heads=4), batch(llama())
    optimizer = torch.optim.AdamW(model.param_groups(phase, lr=1e-2, route_lr=0.5))
    losses = []
    for _ in range(5):
        loss = model(**inputs, tasks=list(TASKS)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses


def test_the_report_names_sites_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    model = routed(llama(), num_heads=4)
    assert "14 sites:" in model.describe()
    assert "2 x k_proj [32 -> 16]" in model.describe()
    model.set_phase("z")
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable: {4 * 14 * 4 * 4:,} of ")
