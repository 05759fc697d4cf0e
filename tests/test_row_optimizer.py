"""The row-wise optimizer against `torch.optim.AdamW`, in float64."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TASKS, routed, stack
from torch import Tensor, nn

from polyroute import InputError, RoutedModel
from polyroute.routes.row_optimizer import RowAdamW

RATES: dict[str, Any] = {
    "lr": 0.01, "route_lr": 0.1, "weight_decay": 0.02, "route_weight_decay": 0.3,
    "betas": (0.8, 0.95), "eps": 1e-6,
}  # fmt: skip


def model_of(tasks: tuple[str, ...] = TASKS, **config: Any) -> RoutedModel:
    return routed(stack(), tasks, num_heads=2, num_skills=3, rank=2, **config).double()


def dense_optimizer(model: RoutedModel, **rates: Any) -> torch.optim.Optimizer:
    rates = {**RATES, **rates}
    options = {name: rates.pop(name) for name in ("betas", "eps")}
    return torch.optim.AdamW(model.param_groups("full", **rates), **options)


def inputs(step: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 8, generator=generator, dtype=torch.float64)


def loss_of(model: RoutedModel, step: int, tasks: list[str]) -> Tensor:
    loss: Tensor = model(inputs(step, len(tasks)), tasks=tasks).square().sum()
    return loss


def take_step(model: RoutedModel, optimizer: Any, step: int, tasks: list[str]) -> None:
    loss_of(model, step, tasks).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def assert_same(actual: RoutedModel, expected: RoutedModel) -> None:
    theirs = expected.state_dict()
    assert actual.state_dict().keys() == theirs.keys()
    for name, tensor in actual.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


def test_rows_that_are_in_every_batch_move_as_under_adamw() -> None:
    rowwise, dense = model_of(), model_of()
    ours, theirs = rowwise.optimizer("full", **RATES), dense_optimizer(dense)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step))
        for one in (ours, theirs)
    ]
    for step in range(6):
        take_step(rowwise, ours, step, list(TASKS) * 2)
        take_step(dense, theirs, step, list(TASKS) * 2)
        for schedule in schedules:
            schedule.step()
    assert_same(rowwise, dense)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6))
def test_each_row_moves_as_under_adamw_run_on_its_own_steps(batches: list[set[int]]) -> None:
    model = model_of()
    optimizer = model.optimizer("z", **RATES)  # skills stand still, so rows do not see each other
    # Reference: the rows as separate parameters, each stepped when it has a gradient.
    rows = [nn.Parameter(model.routes[task].reshape(-1)) for task in TASKS]
    separate = torch.optim.AdamW(
        rows, lr=RATES["route_lr"], weight_decay=RATES["route_weight_decay"],
        betas=RATES["betas"], eps=RATES["eps"],
    )  # fmt: skip
    whole = model_of()
    whole.set_phase("z")
    assert whole.routes.logits is not None
    for step, batch in enumerate(batches):
        tasks = [TASKS[i] for i in sorted(batch)]
        take_step(model, optimizer, step, tasks)
        with torch.no_grad():
            whole.routes.logits.copy_(torch.stack(rows))
        whole.routes.logits.grad = None
        loss_of(whole, step, tasks).backward()  # type: ignore[no-untyped-call]
        for i, row in enumerate(rows):
            row.grad = whole.routes.logits.grad[i].clone() if i in batch else None
        separate.step()
    for task, row in zip(TASKS, rows, strict=True):
        torch.testing.assert_close(model.routes[task].reshape(-1), row.detach(), rtol=1e-9, atol=0)


def test_rows_outside_the_batch_are_not_touched_and_have_no_state() -> None:
    model = model_of()
    optimizer = model.optimizer("full", **RATES)
    assert isinstance(optimizer, RowAdamW)
    before = {task: model.routes[task] for task in TASKS}
    for step in range(3):
        take_step(model, optimizer, step, ["birch", "mu", "birch"])
    for task in TASKS:
        assert torch.equal(model.routes[task], before[task]) == (task != "birch")
    table = optimizer.state_dict()["table"]
    assert table["row"].tolist() == [1]
    assert table["step"].tolist() == [3]
    assert table["exp_avg"].shape == (1, 18)


def test_gradients_of_several_forwards_and_backwards_add_up() -> None:
    rowwise, dense = model_of(), model_of()
    ours, theirs = rowwise.optimizer("full", **RATES), dense_optimizer(dense)
    for model, optimizer in ((rowwise, ours), (dense, theirs)):
        loss = loss_of(model, 0, ["amber", "birch"]) * loss_of(model, 1, ["birch", "cedar"])
        loss.backward()  # type: ignore[no-untyped-call]
        loss_of(model, 2, ["dune", "amber", "dune"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert rowwise.routes.touched is not None
    assert rowwise.routes.touched.shape == (4, 18)
    assert_same(rowwise, dense)


def test_noisy_gates_add_up_the_examples_of_a_row() -> None:
    rowwise, dense = (model_of(gate="relaxed_bernoulli").train() for _ in range(2))
    ours, theirs = rowwise.optimizer("full", **RATES), dense_optimizer(dense)
    for model, optimizer in ((rowwise, ours), (dense, theirs)):
        torch.manual_seed(0)
        take_step(model, optimizer, 0, [*TASKS, "amber", "amber"])
    assert_same(rowwise, dense)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_the_small_parameter_never_holds_more_than_one_step(owner: str, set_to_none: bool) -> None:
    model = model_of()
    optimizer = model.optimizer("full", **RATES)
    clear: Any = {"optimizer": optimizer, "model": model}[owner].zero_grad
    for step, task in enumerate(TASKS):
        loss_of(model, step, [task]).backward()  # type: ignore[no-untyped-call]
        assert model.routes.touched is not None
        assert model.routes.touched.shape == (1, 18)
        if step % 2:  # a step that is skipped, as a gradient scaler does
            optimizer.step()
        clear(set_to_none=set_to_none)
    loss_of(model, 9, ["amber"]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert optimizer.state_dict()["table"]["row"].tolist() == [0, 1, 3]


def test_gradients_that_a_step_used_are_not_used_again() -> None:
    model = model_of()
    optimizer = model.optimizer("full", **RATES)
    take_step(model, optimizer, 0, ["amber"])
    before = model.routes["amber"]
    optimizer.step()
    assert torch.equal(model.routes["amber"], before)


def test_clipping_sees_the_same_norm_as_with_a_dense_table() -> None:
    rowwise, dense = model_of(), model_of()
    ours, theirs = rowwise.optimizer("full", **RATES), dense_optimizer(dense)
    norms = []
    for model, optimizer in ((rowwise, ours), (dense, theirs)):
        loss_of(model, 0, list(TASKS)).backward()  # type: ignore[no-untyped-call]
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
    torch.testing.assert_close(norms[0], norms[1])
    assert norms[0] > 0.1
    assert_same(rowwise, dense)


def test_a_closure_is_called() -> None:
    rowwise, dense = model_of(), model_of()
    for model, optimizer in (
        (rowwise, rowwise.optimizer("full", **RATES)),
        (dense, dense_optimizer(dense)),
    ):

        def closure(model: RoutedModel = model) -> Tensor:
            loss = loss_of(model, 0, list(TASKS))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        assert optimizer.step(closure) > 0
    assert_same(rowwise, dense)


def test_a_gradient_scaler_works() -> None:
    scaled, plain = model_of().float(), model_of().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ours, theirs = scaled.optimizer("full", **RATES), plain.optimizer("full", **RATES)
    x = inputs(0, 2).float()
    scaler.scale(scaled(x, tasks=["amber", "dune"]).square().sum()).backward()
    scaler.unscale_(ours)
    nn.utils.clip_grad_norm_(scaled.parameters(), 1.0)
    scaler.step(ours)
    scaler.update()
    plain(x, tasks=["amber", "dune"]).square().sum().backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    theirs.step()
    for name, tensor in scaled.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_small_parameter_is_no_part_of_the_state() -> None:
    model, plain = model_of(), model_of()
    model.optimizer("full")
    loss_of(model, 0, ["amber"]).backward()  # type: ignore[no-untyped-call]
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    total = sum(p.numel() for p in plain.inventory.parameters()) + 4 * 18
    assert model.num_trainable() == total == plain.num_trainable()


def test_tasks_may_come_and_go_between_steps() -> None:
    model, reference = model_of(), model_of()
    ours, theirs = model.optimizer("z", **RATES), reference.optimizer("z", **RATES)
    take_step(model, ours, 0, ["dune", "amber"])
    take_step(reference, theirs, 0, ["dune", "amber"])
    model.add_tasks(["elm", "fir"], init="amber")
    take_step(model, ours, 1, ["elm", "dune"])
    reference.add_task("elm", init="amber")
    take_step(reference, theirs, 1, ["elm", "dune"])
    model.keep_tasks(["fir", "dune"])
    take_step(model, ours, 2, ["dune"])
    take_step(reference, theirs, 2, ["dune"])
    assert torch.equal(model.routes["dune"], reference.routes["dune"])
    assert ours.state_dict()["table"]["step"].tolist() == [3]
    model.add_task("elm")  # a new task of an old name starts anew
    take_step(model, ours, 3, ["elm"])
    assert ours.state_dict()["table"]["step"].tolist() == [3, 1]


def test_dropping_tasks_forgets_the_gradients_of_rows() -> None:
    model = model_of()
    optimizer = model.optimizer("z", **RATES)
    loss_of(model, 0, ["amber"]).backward()  # type: ignore[no-untyped-call]
    model.keep_tasks(["dune", "amber"])
    before = model.routes["dune"]
    optimizer.step()
    assert torch.equal(model.routes["dune"], before)


def test_a_row_that_is_written_between_backward_and_step_keeps_what_was_written() -> None:
    model, dense = model_of(), model_of()
    ours, theirs = model.optimizer("full", **RATES), dense_optimizer(dense)
    for one, optimizer in ((model, ours), (dense, theirs)):
        loss_of(one, 0, list(TASKS)).backward()  # type: ignore[no-untyped-call]
        one.routes["birch"] = torch.ones(3, 2, 3)
        optimizer.step()
    assert_same(model, dense)


def test_the_state_goes_through_a_file() -> None:
    whole, resumed = model_of(), model_of()
    ours = whole.optimizer("full", **RATES)
    for step, tasks in enumerate((["amber"], ["dune", "amber"])):
        take_step(whole, ours, step, tasks)
    file = io.BytesIO()
    torch.save({"optimizer": ours.state_dict(), "model": whole.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    theirs = resumed.optimizer("full", **RATES)
    theirs.load_state_dict(saved["optimizer"])
    for step, tasks in enumerate((["birch", "amber"], ["dune"]), start=2):
        take_step(whole, ours, step, tasks)
        take_step(resumed, theirs, step, tasks)
    assert_same(resumed, whole)
    for name, values in theirs.state_dict()["table"].items():
        torch.testing.assert_close(values, ours.state_dict()["table"][name])


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = model_of()
    optimizer = model.optimizer("full")
    take_step(model, optimizer, 0, ["dune"])
    small = model_of(("x", "y"))
    with pytest.raises(InputError, match="another routing table than this one of 2 tasks with 18"):
        small.optimizer("full").load_state_dict(optimizer.state_dict())
    with pytest.raises(InputError, match="this optimizer state has no rows"):
        optimizer.load_state_dict(dense_optimizer(model_of()).state_dict())


def test_phases_without_routing_are_plain_adamw() -> None:
    model = model_of()
    assert type(model.optimizer("mu")) is torch.optim.AdamW
    shared = routed(stack(), method="shared")
    assert type(shared.optimizer("full")) is torch.optim.AdamW


def test_leaving_row_mode_is_clean_and_the_old_optimizer_says_so() -> None:
    model = model_of()
    former = model.optimizer("full", **RATES)
    take_step(model, former, 0, ["amber"])
    groups = model.param_groups()
    assert [g["name"] for g in groups] == ["skills", "routes"]
    assert groups[1]["params"][0] is model.routes.logits
    assert model.routes.touched is None
    assert model.routes.logits is not None
    assert model.routes.logits.requires_grad
    with pytest.raises(InputError, match="no longer trains the routing table"):
        former.step()
    second = model.optimizer()
    with pytest.raises(InputError, match="use the optimizer made last"):
        former.step()
    take_step(model, second, 0, ["amber"])
    for phase in ("z", "random", "mu-uncollapsed", "mu"):
        model = model_of()
        model.optimizer("full")
        model.set_phase(phase)  # type: ignore[arg-type]
        assert model.routes.touched is None


def test_a_rate_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="route_lr must be positive"):
        model_of().optimizer("full", route_lr=0.0)


def test_a_model_may_be_cast_after_its_optimizer_was_made_and_copied_after_a_step() -> None:
    model = model_of().float()
    optimizer = model.optimizer("full")
    model.double()
    take_step(model, optimizer, 0, ["amber"])
    twin = copy.deepcopy(model)
    assert twin.routes.touched is not None
    assert twin.routes.touched is not model.routes.touched
    before = model.routes["amber"]
    take_step(twin, twin.optimizer(), 1, ["amber"])
    assert torch.equal(model.routes["amber"], before)
    assert not torch.equal(twin.routes["amber"], before)


def test_an_optimizer_that_took_no_step_has_a_state_too() -> None:
    model, other = model_of(), model_of()
    fresh, loaded = model.optimizer("full", **RATES), other.optimizer("full", **RATES)
    loaded.load_state_dict(fresh.state_dict())
    assert loaded.state_dict()["table"]["row"].numel() == 0
    for one, optimizer in ((model, fresh), (other, loaded)):
        take_step(one, optimizer, 0, ["amber", "dune"])
    assert_same(other, model)


def test_evaluation_sees_what_a_step_changed() -> None:
    model = model_of()
    optimizer = model.optimizer("z", **RATES)
    with torch.no_grad():
        before = model(inputs(0, 1), tasks="amber")
    take_step(model, optimizer, 0, ["amber"])
    with torch.no_grad():
        assert not torch.equal(model(inputs(0, 1), tasks="amber"), before)


def test_the_size_of_the_table_does_not_show_in_the_state() -> None:
    model = model_of(tuple(f"task {i}" for i in range(500)))
    optimizer = model.optimizer("full")
    assert isinstance(optimizer, RowAdamW)
    for step in range(20):
        take_step(model, optimizer, step, [f"task {step}", f"task {499 - step}"])
    assert optimizer.state_dict()["table"]["exp_avg"].shape == (40, 18)
    assert len(optimizer._clocks) <= 80
