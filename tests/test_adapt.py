"""Slots are adapted side by side, and each ends where it would end alone."""

import gc
import weakref
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_models import Maker, bert, gpt2, llama, t5
from torch import Tensor, nn

import polyroute.adapting.memory
import polyroute.adapting.slot_training
from polyroute import MHRConfig, RoutedModel, adapt_many, attach
from polyroute.adapting.adapted import Adapted
from polyroute.adapting.memory import bytes_of, plan
from polyroute.adapting.settings import AdaptSettings, variants
from polyroute.data.sampling import draw_few_shot
from polyroute.errors import InputError
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.optimizers import make_optimizer
from polyroute.study.examples import encoded_records

TRAINED = ("first", "second", "third")
WORDS = ["cat", "dog", "mat", "ran", "sat", "big", "red", "two"]
CHOICES = ["yes", "no", "maybe"]


def examples(task: str, number: int = 12) -> list[dict[str, Any]]:
    """Of lengths from 1 to 9 words, so that batches by length and batches by slot differ."""
    rng = np.random.default_rng(sum(map(ord, task)))
    return [
        {
            "input": " ".join(rng.choice(WORDS, rng.integers(1, 10))),
            "target": str(rng.choice(CHOICES)),
            "choices": CHOICES,
        }
        for _ in range(number)
    ]


def trained(
    make: Maker = bert,
    method: str = "mhr",
    adapter: str = "lora",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[RoutedModel, ModelKind]:
    """A routed model whose skills and routes do something."""
    torch.manual_seed(0)
    base, tokenizer = make()
    base.to(dtype)
    sizes = {"mhr": {"num_skills": 3, "num_heads": 2}, "poly": {"num_skills": 3}}.get(method, {})
    config = MHRConfig(
        method=method,
        adapter=adapter,
        rank=1 if adapter == "ia3" else 2,
        alpha=3.0,
        dropout=dropout,
        **sizes,
    )  # type: ignore[arg-type]
    model = attach(base, config, TRAINED)
    with torch.no_grad():
        for parameter in model.inventory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for parameter in model.routes.parameters():
            parameter.normal_()
    return model, kind_of(base, tokenizer, max_input=16, max_target=8)


def alone(
    make: Maker, method: str, adapter: str, task: str, seed: int, settings: AdaptSettings
) -> tuple[list[float], list[Tensor]]:
    """The slot as a loop of plain torch over a model that has nothing but its task."""
    model, kind = trained(make, method, adapter, dtype=torch.float64)
    rows = encoded_records(examples(task), task, kind)
    drawn = [rows[i] for i in draw_few_shot(len(rows), settings.shots or len(rows), seed)]
    model.add_task(task)
    model.keep_tasks([task])
    if model.routes.logits is not None:
        model.routes.redraw(0, seed)
    model.set_phase(settings.phase)
    groups = model.param_groups(
        lr=settings.lr,
        route_lr=settings.route_lr,
        weight_decay=settings.weight_decay,
        route_weight_decay=settings.route_weight_decay,
    )
    optimizer = make_optimizer(
        settings.optimizer, groups, model, scale_parameter=settings.scale_parameter
    )
    rates = [group["lr"] for group in groups]
    trained_ones = [p for group in groups for p in group["params"]]
    model.eval()
    rng = np.random.Generator(np.random.PCG64(seed))
    queue: list[int] = []
    losses = []
    rising = max(1, round(settings.warmup * settings.steps))
    for step in range(settings.steps):
        while len(queue) < settings.batch_size:
            queue += rng.permutation(len(drawn)).tolist()
        batch, queue = queue[: settings.batch_size], queue[settings.batch_size :]
        loss = kind.loss(model, kind.collate([drawn[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained_ones, settings.max_grad_norm)
        factor = (step + 1) / rising
        if step >= rising:
            factor = (settings.steps - step) / max(1, settings.steps - rising + 1)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        losses.append(loss.item())
    tensors = [f for factors in model.factors_of(task) for f in vars(factors).values()]
    return losses, [t.detach() for t in tensors]


def tensors_of(result: Adapted) -> list[Tensor]:
    return [tensor for factors in result.factors for tensor in vars(factors).values()]


COMMON: dict[str, Any] = {"shots": 8, "steps": 6, "batch_size": 3, "route_lr": 0.3, "lr": 0.02}


@pytest.mark.parametrize(
    ("make", "method", "adapter", "phase", "optimizer"),
    [
        (bert, "mhr", "lora", "z", "adamw"),
        (bert, "mhr", "lora", "mu", "adamw"),
        (bert, "mhr", "lora", "full", "adamw"),
        (bert, "mhr", "lora", "mu-uncollapsed", "adamw"),
        (bert, "mhr", "lora", "full", "adafactor"),
        (bert, "mhr", "lora", "mu", "adafactor"),
        (bert, "poly", "lora", "z", "sgd"),
        (bert, "mhr", "ia3", "full", "sgd"),
        (bert, "mhr", "ia3", "mu", "adamw"),
        (bert, "shared", "lora", "full", "adamw"),
        (bert, "private", "lora", "full", "adamw"),
        (t5, "mhr", "lora", "z", "adamw"),
        (t5, "mhr", "lora", "full", "sgd"),
        (llama, "mhr", "lora", "z", "adamw"),
        (llama, "poly", "lora", "mu", "sgd"),
        (gpt2, "mhr", "lora", "full", "sgd"),
    ],
)
def test_every_slot_ends_where_it_would_end_alone(
    make: Maker, method: str, adapter: str, phase: Any, optimizer: str
) -> None:
    # Where a gradient is itself rounding, AdamW makes a whole step of it.
    model, kind = trained(make, method, adapter, dtype=torch.float64)
    settings = {
        **COMMON, "optimizer": optimizer, "weight_decay": 0.1, "route_weight_decay": 0.2
    }  # fmt: skip
    results = adapt_many(
        model,
        {"new": examples("new"), "other": examples("other")},
        kind=kind,
        phase=phase,
        seeds=[3, 4],
        grid={"steps": [6, 4]},  # so that slots leave the batch at different times
        **{k: v for k, v in settings.items() if k != "steps"},
    )
    assert [(r.task, r.settings.steps, r.seed) for r in results] == [
        (task, steps, seed) for task in ("new", "other") for steps in (6, 4) for seed in (3, 4)
    ]
    for result in results:
        losses, expected = alone(make, method, adapter, result.task, result.seed, result.settings)
        assert result.first_loss == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
        assert result.last_loss == pytest.approx(losses[-1], rel=1e-4, abs=1e-5)
        for actual, tensor in zip(tensors_of(result), expected, strict=True):
            torch.testing.assert_close(actual, tensor, rtol=1e-5, atol=1e-5)


def test_phase_random_starts_afresh_and_depends_on_the_seed_alone() -> None:
    model, kind = trained()
    given = {"new": examples("new")}
    together = adapt_many(model, given, kind=kind, phase="random", seeds=[1, 2], **COMMON)
    single = adapt_many(model, given, kind=kind, phase="random", seeds=[2], **COMMON)
    for actual, expected in zip(tensors_of(together[1]), tensors_of(single[0]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    different = zip(tensors_of(together[0]), tensors_of(together[1]), strict=True)
    assert not all(torch.allclose(a, b) for a, b in different)


def state(model: RoutedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("phase", ["z", "mu", "full", "random"])
def test_the_model_is_left_as_it_was(phase: Any) -> None:
    model, kind = trained()
    model.train()
    model.base_model.encoder.eval()  # a part may be in another mode than the whole
    modes = [module.training for module in model.modules()]
    gradients = [torch.ones_like(p) for p in model.inventory.parameters()]
    for parameter, gradient in zip(model.inventory.parameters(), gradients, strict=True):
        parameter.grad = gradient
    before, parts = state(model), (model.inventory, model.routes, model.mixer)
    flags = [p.requires_grad for p in model.parameters()]
    adapt_many(model, {"new": examples("new")}, kind=kind, phase=phase, **COMMON)
    assert (model.inventory, model.routes, model.mixer) == parts
    assert [p.requires_grad for p in model.parameters()] == flags
    for parameter, gradient in zip(model.inventory.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.ones_like(gradient))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_dropout_and_company_draw_nothing_from_the_global_generator() -> None:
    model, kind = trained(dropout=0.5)
    given = {"new": examples("new")}
    torch.manual_seed(1)
    first = adapt_many(model, given, kind=kind, phase="full", **COMMON)[0]
    torch.manual_seed(2)
    second = adapt_many(model, given, kind=kind, phase="full", **COMMON)[0]
    for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
        assert torch.equal(one, other)


def test_a_route_of_phase_z_is_all_there_is_to_take_over(tmp_path: Path) -> None:
    model, kind = trained()
    result = adapt_many(model, {"new": examples("new")}, kind=kind, phase="z", **COMMON)[0]
    assert result.route is not None
    model.add_task("new", result.route)
    mine = [t for factors in model.factors_of("new") for t in vars(factors).values()]
    for actual, expected in zip(mine, tensors_of(result), strict=True):
        torch.testing.assert_close(actual, expected)
    result.export_peft(tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_a_copied_route_is_where_a_slot_starts() -> None:
    model, kind = trained()
    settings = {**COMMON, "route_lr": 1e-9, "init": "second"}
    result = adapt_many(model, {"new": examples("new")}, kind=kind, phase="z", **settings)[0]
    assert result.route is not None
    torch.testing.assert_close(result.route, model.routes["second"])


def test_waves_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = trained()
    given = {name: examples(name) for name in ("a", "b", "c")}
    settings = {**COMMON, "optimizer": "sgd"}
    many = adapt_many(model, given, kind=kind, phase="full", seeds=[0, 1], **settings)
    monkeypatch.setattr(polyroute.adapting.memory, "MOST_SLOTS", 2)
    monkeypatch.setattr(polyroute.adapting.memory, "CPU_ACTIVATION", 16 * 16)
    few = adapt_many(model, given, kind=kind, phase="full", seeds=[0, 1], **settings)
    for one, other in zip(many, few, strict=True):
        for actual, expected in zip(tensors_of(one), tensors_of(other), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_early_stopping_takes_the_best_step_and_leaves_the_batch() -> None:
    model, kind = trained()
    settings = {**COMMON, "steps": 40, "route_lr": 3.0, "shots": 6, "validation_shots": 6}
    full = adapt_many(model, {"new": examples("new")}, kind=kind, phase="z", eval_steps=2,
                      **settings)[0]  # fmt: skip
    stopped = adapt_many(model, {"new": examples("new")}, kind=kind, phase="z", eval_steps=2,
                         patience=2, **settings)[0]  # fmt: skip
    assert full.steps == 40
    assert full.best_step <= 40
    assert stopped.steps < 40
    assert stopped.steps == stopped.best_step + 4  # two looks, two steps apart, without a gain
    # The result is what the model was at its best step: its loss there is the loss that was noted.
    assert stopped.route is not None
    model.add_task("new", stopped.route)
    rows = encoded_records(examples("new"), "new", kind)
    held = [rows[i] for i in draw_few_shot(12, 12, 0)[6:]]
    loss = kind.loss(model.eval(), kind.collate(held)).item()
    assert stopped.validation_loss == pytest.approx(loss, rel=1e-5)
    assert set(stopped.indices) == set(draw_few_shot(12, 12, 0)[:6])


def test_an_interrupted_adaptation_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import polyroute.adapting.loop as module

    model, kind = trained()
    given = {name: examples(name) for name in ("a", "b")}
    options: dict[str, Any] = {
        **COMMON, "kind": kind, "phase": "full", "validation_shots": 4, "eval_steps": 2,
        "grid": {"optimizer": ["adamw", "adafactor", "sgd"]},
    }  # fmt: skip
    expected = adapt_many(model, given, **options)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0.0)
    steps = 0
    take = module._take_step

    def interrupted(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(module, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt_many(model, given, folder=tmp_path / "x", **options)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == 6
    actual = adapt_many(model, given, folder=tmp_path / "x", **options)
    assert steps == 4 + 3  # three of the six steps were done before
    assert not list((tmp_path / "x").iterdir())
    for one, other in zip(actual, expected, strict=True):
        assert (one.first_loss, one.last_loss) == (other.first_loss, other.last_loss)
        assert one.best_step == other.best_step
        for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
            assert torch.equal(a, b)


def test_saved_slots_of_other_settings_or_damaged_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import polyroute.adapting.loop as module

    model, kind = trained()
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(polyroute.adapting.slot_training.SlotTraining, "finish", lambda self: 1 / 0)
    options: dict[str, Any] = {**COMMON, "kind": kind, "phase": "z", "folder": tmp_path}
    with pytest.raises(ZeroDivisionError):
        adapt_many(model, {"a/b": examples("a")}, **options)
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    with pytest.raises(InputError, match="other settings"):
        adapt_many(model, {"a/b": examples("a")}, **{**options, "lr": 1.0})
    with pytest.raises(InputError, match="other examples or another inventory"):
        adapt_many(model, {"a/b": examples("b")}, **options)
    with torch.no_grad():
        next(model.inventory.parameters()).neg_()
    with pytest.raises(InputError, match="other examples or another inventory"):
        adapt_many(model, {"a/b": examples("a")}, **options)
    with torch.no_grad():
        next(model.inventory.parameters()).neg_()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{path.name}"):
        adapt_many(model, {"a/b": examples("a")}, **options)


def test_a_slot_that_diverges_leaves_the_others_alone() -> None:
    model, kind = trained()
    results = adapt_many(
        model, {"new": examples("new")}, kind=kind, phase="full",
        grid={"lr": [0.02, 1e37]}, **{k: v for k, v in COMMON.items() if k != "lr"},
    )  # fmt: skip
    alone_ = adapt_many(model, {"new": examples("new")}, kind=kind, phase="full", **COMMON)
    good, bad = results
    assert good.diverged_at is None
    assert bad.diverged_at is not None
    for actual, expected in zip(tensors_of(good), tensors_of(alone_[0]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phase", ["mu", "full"])
def test_a_slot_that_diverges_in_its_last_step_has_diverged(phase: Any) -> None:
    model, kind = trained()
    rates = {**COMMON, "lr": 1e37, "steps": 1}
    [result] = adapt_many(model, {"new": examples("new")}, kind=kind, phase=phase, **rates)
    assert result.diverged_at == 1


@pytest.mark.parametrize("make", [bert, t5, llama])
@pytest.mark.parametrize("phase", ["z", "mu", "full"])
def test_a_deterministic_slot_is_the_same_in_any_company(make: Maker, phase: Any) -> None:
    model, kind = trained(make)
    given = {name: examples(name) for name in ("one", "other", "third")}
    options = {"kind": kind, "phase": phase, "deterministic": True, **COMMON}
    together = adapt_many(model, given, **options)
    for place, name in enumerate(given):
        (alone,) = adapt_many(model, {name: given[name]}, memory="200MB", **options)
        for actual, expected in zip(tensors_of(together[place]), tensors_of(alone), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("make", [bert, t5, llama])
def test_batches_have_at_most_so_many_tokens(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = trained(make)
    seen: list[tuple[int, int]] = []
    losses = kind.row_losses

    def ids(batch: Any) -> list[Tensor]:
        """All tensors of token ids in a batch; the labels of a causal one are a second copy."""
        found = [batch["input_ids"]] if "input_ids" in batch else []
        found += [batch["labels"]] if make is t5 else []
        return found + [batch[k]["input_ids"] for k in ("inputs", "choices") if k in batch]

    def noted(model: Any, batch: Any) -> Tensor:
        found = losses(model, batch)
        seen.append((len(found), sum(t.numel() for t in ids(batch))))
        return found

    monkeypatch.setattr(kind, "row_losses", noted)
    limit = 60 if make is bert else 150
    monkeypatch.setattr(polyroute.adapting.memory, "CPU_ACTIVATION", 16 * limit)
    adapt_many(model, {"a": examples("a"), "b": examples("b")}, kind=kind, phase="z", **COMMON)
    assert all(count == 1 or tokens <= limit for count, tokens in seen)
    assert sum(count for count, _ in seen) == 2 * (6 * 3 + 1)  # one looks at the end
    assert max(count for count, _ in seen) > 1


def test_memory_is_shared_between_activations_and_slots() -> None:
    model, kind = trained()
    small, large = plan(model, kind, "full", "1MB"), plan(model, kind, "full", "2MB")
    assert large.slots >= 2 * small.slots > 0
    assert plan(model, kind, "z", "1MB").slots > small.slots
    with pytest.raises(InputError, match="too small: one slot of phase 'full' needs about"):
        plan(model, kind, "full", "1KB")


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("2 GiB", 2**31), ("500mb", 5 * 10**8), (123, 123)]
)
def test_sizes_of_memory(text: str | int, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "eight", "-1GB", "8XB", "0GB", "nan", "\u0663GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="must be a size"):
        bytes_of(text)


@pytest.mark.parametrize("name", ["a\nb", "\ud800", ""])
def test_a_name_that_cannot_be_written_is_refused_before_training(name: str) -> None:
    model, kind = trained()
    with pytest.raises(InputError, match=r"has the character U\+|non-empty string"):
        adapt_many(model, {name: examples("new")}, kind=kind)


def test_settings_of_a_grid_have_labels() -> None:
    found = variants(AdaptSettings(phase="z"), {"route_lr": [0.1, 1.0], "steps": [5]})
    assert list(found) == ["route_lr=0.1,steps=5", "route_lr=1.0,steps=5"]
    assert [s.route_lr for s in found.values()] == [0.1, 1.0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grid": {"phase": ["z", "mu"]}}, "phase cannot vary"),
        ({"grid": {"rate": [1]}}, "no setting 'rate'"),
        ({"grid": {"lr": []}}, "must be a list of values"),
        ({"grid": {"lr": [1.0, 1.0]}}, "repeats a value"),
        ({"speed": 3}, "no setting 'speed'"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"shots": 50}, "task 'new': cannot draw 50 shots from 12"),
        ({"validation_shots": 12}, "none is left"),
        ({"patience": 3}, "set validation_shots"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'"),
        ({"phase": "zz"}, "unknown phase 'zz'"),
        ({"memory": "much"}, "must be a size such as 8GB"),
        ({"init": "nothing", "phase": "z"}, "unknown task 'nothing'"),
        ({"init": 1, "phase": "z"}, "init must be a name"),
        ({"lr": "abc"}, "lr must be a finite number"),
        ({"batch_size": 2.5}, "batch_size must be a positive whole number"),
        ({"patience": "none"}, "patience must be a positive whole number"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": [2**70]}, "a seed must be at most 4294967295"),
        ({"seeds": [-1]}, "a seed must not be negative"),
        ({"route_lr": 1e39}, "at most 1e"),
        ({"deterministic": "yes"}, "deterministic must be True or False"),
        ({"folder": ""}, "a path is empty"),
        ({"folder": "x" * 300}, "has a name of 300 bytes in it"),
    ],
)
def test_bad_requests_end_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    model, kind = trained()
    with pytest.raises(InputError, match=sentence):
        adapt_many(model, {"new": examples("new")}, kind=kind, **options)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "at least one"),
        ("text", "must be a list"),
        ([{"input": "cat"}], "example 0: the field 'target' is missing"),
        ([{"target": "yes"}], "both empty"),
        ([3], "must be a dictionary"),
        ([{"input": "cat", "target": 3}], "must be a string"),
    ],
)
def test_bad_examples_are_named(given: Any, sentence: str) -> None:
    model, kind = trained()
    with pytest.raises(InputError, match=sentence):
        adapt_many(model, {"new": given}, kind=kind)


@pytest.mark.parametrize("make", [bert, t5, llama, gpt2])
def test_the_loss_of_a_batch_is_that_of_its_rows(make: Maker) -> None:
    model, kind = trained(make)
    rows = encoded_records(examples("first"), "first", kind)
    batch = kind.collate(rows)
    model.eval()
    sums = kind.row_losses(model, batch)
    assert sums.shape == (len(rows), 1)
    mean = sums.sum() / sum(count for (count,) in kind.row_counts(rows))
    torch.testing.assert_close(mean, kind.loss(model, batch), rtol=1e-5, atol=1e-6)


def test_nothing_is_trained_where_a_later_slot_could_not_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import polyroute.adapting.loop as module

    monkeypatch.setattr(polyroute.adapting.memory, "MOST_SLOTS", 1)
    monkeypatch.setattr(module, "_take_step", lambda *_: pytest.fail("a step was taken"))
    model, kind = trained()
    with pytest.raises(InputError, match="unknown task 'typo'"):
        adapt_many(
            model, {"a": examples("a")}, kind=kind, phase="z", grid={"init": ["first", "typo"]}
        )
    text = [{"input": "cat", "target": "dog"}]
    with pytest.raises(InputError, match="without choices"):
        adapt_many(model, {"a": examples("a"), "b": text}, kind=kind)


def test_a_shared_adapter_has_no_phase_z() -> None:
    model, kind = trained(method="shared")
    with pytest.raises(InputError, match="has none here"):
        adapt_many(model, {"a": examples("a")}, kind=kind, phase="z")


def test_names_of_files_are_short_and_apart(tmp_path: Path) -> None:
    model, kind = trained()
    names = ["\u6f22" * 90, "\u6f22" * 90 + "x"]
    results = adapt_many(
        model, {name: examples("a") for name in names}, kind=kind, folder=tmp_path, **COMMON
    )
    assert [r.task for r in results] == names


def test_the_average_cannot_be_routed_while_slots_are_open() -> None:
    from polyroute.adapting.slots import Slots

    model, _ = trained()
    with (
        Slots(model, "full", 2),
        pytest.raises(InputError, match="while they are open"),
    ):
        model.factors_of("mu")


def test_every_setting_declares_its_check_and_its_help() -> None:
    for field in fields(AdaptSettings):
        assert field.metadata["check"] is not None, field.name
        assert field.metadata["help"].endswith("."), field.name


def test_a_result_keeps_no_model_alive(tmp_path: Path) -> None:
    model, kind = trained()
    (result,) = adapt_many(model, {"a": examples("a")}, kind=kind, phase="z", **COMMON)
    model.add_task("a", result.route)
    model.export_peft("a", tmp_path / "model")
    base = weakref.ref(model.base_model)
    del model, kind
    gc.collect()
    assert base() is None
    result.export_peft(tmp_path / "result")
    names = ("adapter_config.json", "adapter_model.safetensors")
    ours, expected = (
        [(tmp_path / place / name).read_bytes() for name in names] for place in ("result", "model")
    )
    assert ours == expected
