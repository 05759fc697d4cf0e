"""Adafactor over stacks against transformers' over separate tensors, and the knobs of training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import EXAMPLES, made
from base_models import t5 as tokenized_t5
from datasets import Dataset
from models import TASKS, llama, routed, stack, t5
from tiny_runs import write_base, write_suite
from torch import Tensor, nn
from transformers import Adafactor

from polyroute import InputError, MHRConfig, RoutedModel, attach
from polyroute.adapting.settings import AdaptSettings
from polyroute.adapting.slots import Slots
from polyroute.kinds.base import ModelKind
from polyroute.optimizers import LayerAdafactor, make_optimizer
from polyroute.program.cli.app import main
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

RATES: dict[str, Any] = {
    "lr": 1e-2, "route_lr": 0.1, "weight_decay": 0.1, "route_weight_decay": 0.2
}  # fmt: skip
PLAIN: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0}


def published(model: RoutedModel, tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Tensors of the inventory and the table, cut as in the published code.

    A `(H, K, d_in/H, r)` and B `(H, K, r, d_out/H)` or (IA)^3 `(K, H, d_out/H)` for each layer,
    logits `(T, H K)` for each router.
    """
    skills, routes = [], []
    for name, tensor in tensors.items():
        if name.startswith("routes"):
            n, heads, k = model.routes.shape or (0, 0, 0)
            routes += [tensor.reshape(len(tensor), n, heads * k)[:, i] for i in range(n)]
        elif name.startswith("inventory.ia3"):
            skills += [layer[:, :, 0].transpose(0, 1) for layer in tensor]
        else:
            is_a = "lora_a" in name
            skills += [layer.transpose(-1, -2) if is_a else layer for layer in tensor]
    return {"skills": skills, "routes": routes}


def learned(model: RoutedModel) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.startswith(("inventory", "routes"))}


@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize(
    ("base", "tasks", "config"),
    [
        (t5, TASKS, {"num_heads": 4, "rank": 1}),
        (t5, TASKS[:1], {"num_heads": 4, "rank": 2, "granularity": "coderwise"}),
        (llama, TASKS, {"num_heads": 2, "rank": 3, "granularity": "blockwise"}),
        (llama, TASKS, {"num_heads": 4, "adapter": "ia3"}),
        (t5, TASKS, {"method": "poly", "granularity": "coarsegrained"}),
        (llama, TASKS, {"method": "private"}),
    ],
)
def test_every_layer_and_router_moves_as_a_tensor_of_its_own(
    base: Any, tasks: tuple[str, ...], config: dict[str, Any], scale_parameter: bool
) -> None:
    model = routed(base(), tasks, **config)
    model.inventory.double()
    model.routes.double()
    parameters = learned(model)
    groups = model.param_groups("full", **RATES)
    ours = LayerAdafactor(groups, model, scale_parameter=scale_parameter)
    separate = {
        name: [nn.Parameter(t.detach().clone()) for t in cut]
        for name, cut in published(model, parameters).items()
    }
    theirs = Adafactor(
        [{**g, "params": separate[g["name"]]} for g in groups],
        relative_step=False,
        scale_parameter=scale_parameter,
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for p in parameters.values():
            # Rare tasks and layers of unlike size: there tensor boundaries matter.
            size = torch.rand(len(p), *[1] * (p.ndim - 1), generator=generator) ** 8
            size[size < 0.01] = 0.0
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * size
        gradients = published(model, {n: p.grad for n, p in parameters.items()})
        for name, cut in separate.items():
            for p, gradient in zip(cut, gradients[name], strict=True):
                p.grad = gradient.clone()
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9 if step else 1.0
            optimizer.step()
    for name, cut in published(model, parameters).items():
        torch.testing.assert_close(cut, [p.detach() for p in separate[name]], check_stride=False)


def test_a_slot_moves_as_separate_tensors_in_single_precision() -> None:
    model = routed(t5(), num_heads=4)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), Slots(model, "full", 3) as slots:
        slots.start(1, seed=0)
        parts = slots.parameters(1)
        groups: list[Any] = [{"name": n, "params": p, **PLAIN} for n, p in parts.items()]
        optimizer = make_optimizer("adafactor", groups, model)
        names = [f"inventory.{kind}.{stack.key}" for stack in slots.inventory.stacks
                 for kind in slots.inventory.factor_names]  # fmt: skip

        def cut(skills: list[Tensor], row: Tensor) -> list[Tensor]:
            tensors = dict(zip(names, skills, strict=True))
            found = published(model, {**tensors, "routes": row[None]})
            return [*found["skills"], *found["routes"]]

        separate = [nn.Parameter(t.clone()) for t in cut(parts["skills"], parts["routes"][0])]
        theirs = Adafactor(separate, lr=1e-2, relative_step=False)
        for _ in range(20):
            for p in (*parts["skills"], *parts["routes"]):
                p.grad = torch.randn(p.shape, generator=generator)
            gradients = cut([p.grad for p in parts["skills"]], parts["routes"][0].grad)
            for p, gradient in zip(separate, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
            theirs.step()
        actual = cut(parts["skills"], parts["routes"][0])
        torch.testing.assert_close(actual, [p.detach() for p in separate], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("scale_parameter", "skills", "routes"), [(True, 3e-6, 1e-4), (False, 3e-3, 0.1)]
)
def test_the_first_step_of_fresh_tensors(
    scale_parameter: bool, skills: float, routes: float
) -> None:
    model = attach(t5(), MHRConfig(num_heads=4), TASKS)
    groups = model.param_groups("full", lr=3e-3, route_lr=0.1)
    optimizer = make_optimizer("adafactor", groups, model, scale_parameter=scale_parameter)
    before = {name: p.detach().clone() for name, p in learned(model).items()}
    for p in learned(model).values():
        p.grad = -torch.ones_like(p)
    optimizer.step()
    for name, p in learned(model).items():
        if "lora_a" not in name:
            expected = torch.full_like(p, routes if "routes" in name else skills)
            torch.testing.assert_close(p - before[name], expected, rtol=1e-3, atol=1e-7)


def test_logits_that_scale_their_steps_grow_slowly_and_then_by_a_tenth() -> None:
    model = attach(stack(), MHRConfig(num_heads=4), TASKS)
    optimizer = LayerAdafactor(model.param_groups("z", route_lr=0.1), model)
    (group,) = optimizer.param_groups
    (logits,) = group["params"]
    found = []
    for step in range(100):
        group["lr"] = 0.1 if step else 0.0  # the first step of a schedule is nothing
        logits.grad = torch.ones_like(logits)
        optimizer.step()
        found.append(logits.abs().mean().item())
    stated = {10: 9e-4, 20: 2.4e-3, 50: 0.04, 100: 5.0}
    assert {n: found[n - 1] for n in stated} == pytest.approx(stated, rel=0.15)
    assert found[-1] / found[-2] == pytest.approx(1.1, rel=1e-3)


def test_a_closure_computes_the_gradients_of_the_step() -> None:
    model = attach(stack(), MHRConfig(num_heads=4), TASKS)
    optimizer = LayerAdafactor(model.param_groups("full"), model)
    before = [p.detach().clone() for p in learned(model).values()]

    def closure() -> float:
        loss = sum(p.square().sum() for p in learned(model).values())
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    moved = [not torch.equal(p, q) for p, q in zip(learned(model).values(), before, strict=True)]
    assert moved == ["lora_b" not in name for name in learned(model)]  # B is 0, and so its gradient


# ------------------------------------------------------------- multi-task training


def parts(seed: int = 1) -> tuple[RoutedModel, ModelKind, Dataset]:
    wrapper, kind = made(tokenized_t5)
    model = routed(wrapper.base_model, ("where", "truth", "count"), num_heads=4, seed=seed)
    rows = Dataset.from_dict(kind.encode(EXAMPLES), features=kind.features).sort("task")
    return model, kind, rows


def trainer(folder: Path, seed: int = 1, **values: Any) -> MultiTaskTrainer:
    usual = {"max_steps": 6, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
             "optim": "adafactor", "save_steps": 3}  # fmt: skip
    model, kind, rows = parts(seed)
    return MultiTaskTrainer(
        model, kind, MultiTaskTrainingArguments(str(folder), **{**usual, **values}), rows
    )


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused"])
def test_both_groups_state_their_rate_and_decay(tmp_path: Path, optim: str) -> None:
    made_ = trainer(
        tmp_path, optim=optim, learning_rate=2e-3, route_lr=0.3, weight_decay=0.01,
        route_weight_decay=0.02,
    )  # fmt: skip
    optimizer = made_.create_optimizer()
    assert isinstance(optimizer, LayerAdafactor) == (optim == "adafactor")
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {"skills": (2e-3, 0.01), "routes": (0.3, 0.02)}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("linear", [0, 0.5, 1, 0.5, 0]), ("constant_with_warmup", [0, 0.5, 1, 1, 1])],
)
def test_rates_rise_from_nothing_and_fall_to_nothing(
    tmp_path: Path, schedule: str, factors: list[float]
) -> None:
    made_ = trainer(
        tmp_path, warmup_steps=4, learning_rate=2e-3, route_lr=0.3, lr_scheduler_type=schedule
    )
    made_.create_optimizer_and_scheduler(12)
    optimizer, scheduler = made_.optimizer, made_.lr_scheduler
    assert optimizer is not None
    assert scheduler is not None
    found = []
    for _ in range(13):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    for step, factor in zip((0, 2, 4, 8, 12), factors, strict=True):
        assert found[step] == pytest.approx([2e-3 * factor, 0.3 * factor], abs=1e-12)


def test_a_checkpoint_resumes_to_the_same_end(tmp_path: Path) -> None:
    options = {"scale_parameter": False, "warmup_steps": 2, "weight_decay": 0.1}
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, seed=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_what_an_optimizer_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a setting of adafactor, .*adamw_torch"):
        trainer(tmp_path, optim="adamw_torch", scale_parameter=False)
    with pytest.raises(InputError, match="scale_parameter is a setting of adafactor, which sgd"):
        AdaptSettings(optimizer="sgd", scale_parameter=False)
    with pytest.raises(InputError, match="scale_parameter must be True or False, not 1"):
        AdaptSettings(optimizer="adafactor", scale_parameter=1)  # type: ignore[arg-type]
    for value in (-1.0, float("nan"), float("inf"), "much"):
        with pytest.raises(InputError, match="route_weight_decay must"):
            AdaptSettings(route_weight_decay=value)  # type: ignore[arg-type]
    model = attach(stack(), MHRConfig(num_heads=4), TASKS)
    with pytest.raises(InputError, match="unknown optimizer 'adafacter': did you mean 'adafactor'"):
        make_optimizer("adafacter", model.param_groups(), model)
    with pytest.raises(InputError, match=r"groups named 'skills' and 'routes', .* not None"):
        LayerAdafactor([{"params": list(model.inventory.parameters()), **PLAIN}], model)


# ------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    write_suite(folder / "suite")
    write_base(folder / "base")
    return folder


def train(place: Path, run: str, *extra: str) -> list[str]:
    return [
        "train", "--model", str(place / "base"), "--data", str(place / "suite"), "--heads", "4",
        "--steps", "4", "--batch-size", "4", "--max-input", "16", "--max-target", "8",
        "--out", str(place / run), *extra,
    ]  # fmt: skip


def test_what_decides_the_result_is_printed_and_kept(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(train(
        place, "run", "--optimizer", "adafactor", "--no-scale-parameter", "--max-grad-norm", "0.1",
        "--route-weight-decay", "0.01", "--schedule", "constant", "--shared-skill",
        "--logit-dropout", "0.1", "--anneal-steps", "2",
    ))  # fmt: skip
    line = (
        "adafactor of each layer, scale_parameter off, lr 0.001, routes 0.1, decay 0 / 0.01, "
        "clip 0.1, warm-up 6%, constant"
    )
    assert line in " ".join(capsys.readouterr().out.split())
    kept = json.loads((place / "run" / "run.json").read_text())["config"]
    assert (kept["optimization"], kept["scale_parameter"]) == (line, False)
    adapter = json.loads((place / "run" / "polyroute.json").read_text())["config"]
    found = [adapter[name] for name in ("shared_skill", "logit_dropout", "anneal_steps")]
    assert found == [True, 0.1, 2]

    out = place / "adapted"
    main([
        "adapt", str(place / "run"), "--data", str(place / "suite"), "--tasks", "pick", "--phase",
        "full", "--seeds", "0", "--shots", "4", "--steps", "2", "--optimizer", "adafactor",
        "--grid", "scale_parameter=true,false", "--route-weight-decay", "0.5", "--out", str(out),
    ])  # fmt: skip
    lines = [
        f"adafactor of each layer, scale_parameter {sizes}, lr 0.001, routes 0.1, decay 0 / 0.5, "
        "clip 1, warm-up 6%, linear"
        for sizes in ("on", "off")
    ]
    assert " ".join(lines) in " ".join(capsys.readouterr().out.split())
    assert json.loads((out / "run.json").read_text())["config"]["optimization"] == lines
    labels = [result["label"] for result in json.loads((out / "results.json").read_text())]
    assert sorted(labels) == ["scale_parameter=False", "scale_parameter=True"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--optimizer", "sgd"], "unknown --optimizer 'sgd': known: 'adafactor', 'adamw'"),
        (["--no-scale-parameter"], "--no-scale-parameter is for adafactor"),
        (["--optimizer", "adafactor", "--rowwise"], "--rowwise is an AdamW; leave it out"),
        (["--schedule", "cosine"], "unknown --schedule 'cosine'"),
        (["--max-grad-norm", "0"], "--max-grad-norm must be positive, not 0"),
        (["--route-weight-decay", "-1"], "--route-weight-decay must not be negative"),
        (["--anneal-steps", "5"], "--anneal-steps 5 is more than the 4 of --steps"),
        (["--anneal-steps", "-1"], "--anneal-steps must not be negative"),
        (["--logit-dropout", "1"], "--logit-dropout must be in"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(train(place, "refused", *options))
    assert sentence in capsys.readouterr().err
    assert not (place / "refused").exists()
