"""Gradient alignment against autograd's own gradients of the inventory, and while training."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import EXAMPLES, Routed, as_rows, bert, columns, gpt2, made, t5
from datasets import Dataset
from models import routed
from tiny_runs import train_arguments, write_base, write_suite
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from polyroute import InputError, RoutedModel
from polyroute.adapting.slots import Slots
from polyroute.kinds.base import ModelKind
from polyroute.layer.factors import LoRAFactors
from polyroute.program.cli.app import main
from polyroute.saved.runs import read_run
from polyroute.study.alignment import alignment
from polyroute.study.alignment_callback import AlignmentCallback
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

NAMES = ("count", "truth", "where")
METHODS: dict[str, dict[str, Any]] = {
    "poly": {"method": "poly", "alpha": 8},
    "mhr": {"num_heads": 4},
    "routers-of-several-layers": {"num_heads": 2, "granularity": "coarsegrained", "alpha": 1},
    "l2": {"num_heads": 2, "normalization": "l2"},
    "shared": {"method": "shared"},
    "private": {"method": "private"},
    "ia3": {"adapter": "ia3", "num_heads": 4, "target_modules": ["c_attn"]},
}
CASES = [(gpt2, config) for config in METHODS.values()] + [
    (make, METHODS["mhr"]) for make in (t5, bert)
]


def examples(kind: ModelKind) -> dict[str, list[dict[str, Any]]]:
    rows = as_rows(kind.encode(EXAMPLES))
    return {name: [row for row in rows if row["task"] == name] for name in NAMES}


def prepared(make: Any = gpt2, **config: Any) -> tuple[RoutedModel, ModelKind]:
    wrapper, kind = made(make)
    return routed(wrapper.base_model.double(), NAMES, **config).double(), kind


def inventory_gradients(
    model: RoutedModel, kind: ModelKind, rows: list[dict[str, Any]], route: str | None = None
) -> list[Tensor]:
    """For each site, autograd's gradient of all of its skills, flat."""
    batch = kind.collate([{**row, "task": route or row["task"]} for row in rows])
    loss = kind.loss(model, batch)
    parameters = list(model.inventory.parameters())
    found = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    flat: list[list[Tensor]] = [[] for _ in model.sites]
    stacks = [stack for stack in model.inventory.stacks for _ in model.inventory.factor_names]
    for stack, tensor in zip(stacks, model.inventory.skills_of(0, gradients=True), strict=True):
        for site, part in zip(stack.sites, tensor, strict=True):
            flat[site].append(part.reshape(-1).clone())
    model.inventory.zero_grad()
    return [torch.cat(parts) for parts in flat]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return x @ y / (x.norm() * y.norm() + 1e-12)


def compared(gradients: list[list[Tensor]]) -> Tensor:
    """`[sites, pairs]` from the gradients of each task at each site."""
    pairs = list(combinations(range(len(gradients)), 2))
    return torch.stack(
        [
            torch.stack([cosine(gradients[i][site], gradients[j][site]) for i, j in pairs])
            for site in range(len(gradients[0]))
        ]
    )


@pytest.mark.parametrize(("make", "config"), CASES, ids=[*METHODS, "mhr-t5", "mhr-bert"])
def test_the_inventory_alignment_is_that_of_autograds_gradients(
    make: Any, config: dict[str, Any]
) -> None:
    model, kind = prepared(make, **config)
    data = examples(kind)
    found = alignment(model, kind, data)
    gradients = [inventory_gradients(model, kind, rows) for rows in data.values()]
    assert found.tasks == NAMES
    assert found.pairs == ((0, 1), (0, 2), (1, 2))
    assert found.sites == tuple(site.name for site in model.sites)
    is_zero = torch.tensor([[g.norm() == 0 for g in task] for task in gradients])
    skipped = torch.stack([is_zero[i] | is_zero[j] for i, j in found.pairs], dim=1)
    assert torch.equal(found.inventory.isnan(), skipped)
    expected = compared(gradients).masked_fill(skipped, torch.nan)
    torch.testing.assert_close(found.inventory, expected, rtol=0, atol=1e-10, equal_nan=True)


def test_the_effective_alignment_is_that_of_plain_adapters() -> None:
    """Each task as a base model with W + b^T a, differentiated for a and b."""
    model, kind = prepared(bert, num_heads=4, alpha=8)
    wrapper, _ = made(bert)
    base: nn.Module = wrapper.base_model.double()
    data = examples(kind)
    gradients = []
    for task, rows in data.items():
        leaves, weights = [], {}
        for site, factors in zip(model.sites, model.factors_of(task), strict=True):
            assert isinstance(factors, LoRAFactors)
            a = factors.a.double().requires_grad_()
            b = (factors.b.double() / model.inventory.scale).requires_grad_()
            leaves.append((a, b))
            update = model.inventory.scale * b.t() @ a
            weights[f"{site.name}.weight"] = base.get_parameter(f"{site.name}.weight") + update

        class Folded(Routed):
            def forward(self, *, tasks: list[str], **batch: Any) -> Any:
                return functional_call(base, weights, kwargs=batch)  # noqa: B023 - used at once

        kind.loss(Folded(wrapper.base_model), kind.collate(rows)).backward()
        none = torch.zeros(0, dtype=torch.float64)
        gradients.append(
            [
                torch.cat([none if t.grad is None else t.grad.reshape(-1) for t in pair])
                for pair in leaves
            ]
        )
    found = alignment(model, kind, data)
    used = [i for i, gradient in enumerate(gradients[0]) if len(gradient)]
    expected = compared([[task[i] for i in used] for task in gradients])
    # factors_of is single precision.
    torch.testing.assert_close(found.effective[used], expected, rtol=0, atol=1e-5)
    assert found.effective.isnan().all(1).sum() == len(model.sites) - len(used)


def test_private_adapters_share_nothing() -> None:
    model, kind = prepared(method="private")
    found = alignment(model, kind, examples(kind))
    assert torch.equal(found.inventory, torch.zeros_like(found.inventory))
    assert torch.equal(found.overlap, torch.zeros_like(found.overlap))
    assert found.effective.abs().min() > 0


@pytest.mark.parametrize("phase", ["mu", "mu-uncollapsed"])
def test_under_the_average_both_alignments_agree(phase: Any) -> None:
    model, kind = prepared(num_heads=4)
    data = examples(kind)
    as_average = alignment(model, kind, data, route="mu")
    torch.testing.assert_close(as_average.inventory, as_average.effective)
    torch.testing.assert_close(as_average.overlap, torch.full_like(as_average.overlap, 1 / 4))
    model.set_phase(phase)
    found = alignment(model, kind, data)
    torch.testing.assert_close(found.inventory, found.effective)
    torch.testing.assert_close(found.effective, as_average.effective, rtol=0, atol=1e-6)
    assert found.overlap.unique().tolist() == [1.0 if phase == "mu" else 0.25]


def test_the_average_compares_tasks_that_have_no_route() -> None:
    model, kind = prepared(num_heads=4)
    data = {f"new {name}": rows for name, rows in examples(kind).items()}
    assert alignment(model, kind, data, route="mu").tasks == tuple(data)
    with pytest.raises(InputError, match="unknown task 'new count'"):
        alignment(model, kind, data)


def test_the_size_of_a_batch_does_not_matter() -> None:
    model, kind = prepared(bert, num_heads=2)
    data = examples(kind)
    data["truth"] = [*data["truth"], *data["truth"][:1]]
    whole, parts = (alignment(model, kind, data, batch_size=size) for size in (16, 2))
    # Encoders compare embeddings in single precision.
    torch.testing.assert_close(whole.effective, parts.effective, rtol=0, atol=1e-5, equal_nan=True)


def test_zero_gradients_are_counted_and_left_out() -> None:
    model, kind = prepared(num_heads=4)
    data = examples(kind)
    assert alignment(model, kind, data).skipped == 0
    for name, parameter in model.inventory.named_parameters():
        if name.startswith("lora_b"):
            nn.init.zeros_(parameter)
    found = alignment(model, kind, data)  # of all A
    assert found.skipped == len(NAMES) * len(model.sites)
    assert not found.effective.isnan().any()
    for parameter in model.inventory.parameters():
        nn.init.zeros_(parameter)
    found = alignment(model, kind, data)
    assert found.skipped == 2 * len(NAMES) * len(model.sites)
    assert found.effective.isnan().all()
    assert found.mean()["effective"] is None
    assert found.to_dict()["inventory"] == [[None] * 3] * len(model.sites)


def test_a_choice_of_pairs_is_a_part_of_all() -> None:
    model, kind = prepared(num_heads=2)
    data = examples(kind)
    found = alignment(model, kind, data, [("where", "truth")])
    assert found.tasks == ("truth", "where")
    assert found.pairs == ((1, 0),)
    torch.testing.assert_close(found.effective[:, 0], alignment(model, kind, data).effective[:, 2])
    assert found.mean()["effective"] == pytest.approx(float(found.effective.mean()), abs=1e-6)


def test_a_frozen_model_in_training_mode_stays_as_it_is() -> None:
    model, kind = prepared(num_heads=2, dropout=0.5, gate="relaxed_bernoulli")
    data = examples(kind)
    expected = alignment(model, kind, data).to_dict()
    model.train()
    model.requires_grad_(False)
    before, state = torch.random.get_rng_state(), model.state_dict()
    assert alignment(model, kind, data).to_dict() == expected
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert all(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_compared_is_refused() -> None:
    model, kind = prepared(num_heads=2)
    data = examples(kind)
    with pytest.raises(InputError, match="give examples of at least two tasks"):
        alignment(model, kind, {"truth": data["truth"]})
    with pytest.raises(InputError, match="task 'truth' has no examples"):
        alignment(model, kind, {**data, "truth": []})
    with pytest.raises(InputError, match="task 'oak' of a pair has no examples"):
        alignment(model, kind, data, [("truth", "oak")])
    with Slots(model, "full", 2) as slots, pytest.raises(InputError, match="close the slots first"):
        alignment(model, kind, dict(zip(slots.names, data.values(), strict=False)))
    model.merge("truth")
    with pytest.raises(InputError, match="merged with 'truth'"):
        alignment(model, kind, data)


# ------------------------------------------------------------- while training


def training(folder: Path, **values: Any) -> tuple[RoutedModel, ModelKind, Dataset, Any]:
    wrapper, kind = made(t5)
    model = routed(wrapper.base_model, NAMES, num_heads=4, dropout=0.1, gate="relaxed_bernoulli")
    rows = Dataset.from_dict(kind.encode(EXAMPLES), features=kind.features).sort("task")
    usual = {
        "max_steps": 5, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "save_steps": 3, "logging_steps": 1, "route_lr": 0.5,
    }  # fmt: skip
    return model, kind, rows, MultiTaskTrainingArguments(str(folder), **{**usual, **values})


def trained(
    folder: Path, *callbacks: TrainerCallback, measure: int = 0, resume: str | None = None,
    **values: Any,
) -> tuple[RoutedModel, list[dict[str, float]]]:  # fmt: skip
    torch.manual_seed(0)
    model, kind, rows, args = training(folder, **values)
    trainer = MultiTaskTrainer(model, kind, args, rows, callbacks=list(callbacks))
    if measure:
        path = folder / "alignment.json"
        trainer.add_callback(AlignmentCallback(model, kind, rows, path, steps=measure))
    trainer.train(resume_from_checkpoint=resume)
    logs = [
        {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
        for entry in trainer.state.log_history
    ]
    return model, logs


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "alignment.json").read_text())
    return found


@pytest.mark.parametrize("values", [{}, {"rowwise_routes": True}, {"phase": "mu"}])
def test_a_measured_run_is_the_same_bit_for_bit(values: Any, tmp_path: Path) -> None:
    plain, logs = trained(tmp_path / "plain", **values)
    measured, same_logs = trained(tmp_path / "measured", measure=1, **values)
    assert logs == same_logs
    for name, tensor in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], tensor), name
    assert len(read(tmp_path / "measured")["measurements"]) == 5


def test_measurements_are_of_every_so_many_steps_and_the_end(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, measure=2)
    found = read(tmp_path)
    assert found.keys() == {"tasks", "pairs", "sites", "measurements"}
    assert found["tasks"] == list(NAMES)
    assert found["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert found["sites"] == [site.name for site in model.sites]
    assert [each["step"] for each in found["measurements"]] == [2, 4, 5]
    for each in found["measurements"]:
        assert each.keys() == {"step", "seconds", "effective", "inventory", "overlap", "skipped"}
        for name in ("effective", "inventory", "overlap"):
            assert [len(row) for row in each[name]] == [3] * len(model.sites)


def test_a_resumed_run_keeps_what_was_measured(tmp_path: Path) -> None:
    trained(tmp_path / "whole", measure=1)
    trained(tmp_path / "cut", measure=1)
    changed = read(tmp_path / "cut")
    changed["measurements"] = changed["measurements"][:4]  # killed after the checkpoint of step 3
    changed["measurements"][0]["seconds"] = 77.0
    (tmp_path / "cut" / "alignment.json").write_text(json.dumps(changed))
    trained(tmp_path / "cut", measure=1, resume=str(tmp_path / "cut" / "checkpoint-3"))
    found, expected = read(tmp_path / "cut"), read(tmp_path / "whole")
    assert found["measurements"][0]["seconds"] == 77.0
    for one in (found, expected):
        for each in one["measurements"]:
            del each["seconds"]
    assert found == expected
    (tmp_path / "cut" / "alignment.json").write_text('{"tasks": ["oak"]}')
    with pytest.raises(InputError, match="belongs to another run"):
        trained(tmp_path / "cut", measure=1, resume=str(tmp_path / "cut" / "checkpoint-3"))


def test_a_training_that_stops_early_is_measured_at_its_end(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trained(tmp_path, Stop(), measure=2)
    assert [each["step"] for each in read(tmp_path)["measurements"]] == [2, 3]


def test_of_many_tasks_a_few_are_drawn_by_the_seed(tmp_path: Path) -> None:
    wrapper, kind = made(t5)
    names = tuple(f"task {i:02d}" for i in range(20))
    model = routed(wrapper.base_model, names, num_heads=4)
    texts = columns(*[(name, "", f"the cat {i}", "yes", None) for name in names for i in range(9)])
    rows = Dataset.from_dict(kind.encode(texts), features=kind.features)

    def sample(seed: int) -> dict[str, list[Any]]:
        callback = AlignmentCallback(model, kind, rows, tmp_path / "alignment.json", steps=1)
        args = MultiTaskTrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=seed,
            max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        )  # fmt: skip
        trainer = MultiTaskTrainer(model, kind, args, rows, callbacks=[callback])
        trainer.train()
        return callback._sample

    first = sample(0)
    assert len(first) == 8
    assert {len(drawn) for drawn in first.values()} == {2}  # 16 examples, two steps of 4 x 2
    assert all(row["task"] == name for name, drawn in first.items() for row in drawn)
    assert first == sample(0)
    assert first.keys() != sample(1).keys()
    assert read(tmp_path)["tasks"] == list(sample(1))


def test_a_run_of_the_program_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_suite(tmp_path / "suite")
    write_base(tmp_path / "base")
    arguments = train_arguments(tmp_path, "run", "--steps", "2")

    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            main([*arguments, *options])
        return capsys.readouterr().err

    assert "--alignment-steps must not be negative" in refused("--alignment-steps", "-1")
    one = refused("--alignment-steps", "1", "--tasks", "copy")
    assert "only one is trained: leave it off" in one
    assert not (tmp_path / "run").exists()
    main([*arguments, "--alignment-steps", "1"])
    found = read(tmp_path / "run")
    assert found["tasks"] == ["back", "copy", "upper"]
    assert [each["step"] for each in found["measurements"]] == [1, 2]
    assert read_run(tmp_path / "run")["config"]["alignment_steps"] == 1
    assert "alignment_steps=1" in refused("--resume", "--alignment-steps", "0")
    main([*arguments, "--overwrite"])
    assert not (tmp_path / "run" / "alignment.json").exists()


def test_a_callback_that_could_not_measure_is_refused(tmp_path: Path) -> None:
    model, kind, rows, _ = training(tmp_path)
    one = rows.filter(lambda row: row["task"] == "truth")
    with pytest.raises(InputError, match="compares tasks, and only one is trained"):
        AlignmentCallback(model, kind, one, tmp_path / "x.json")
    for steps in (0, 1.5, True):
        with pytest.raises(InputError, match="steps between measurements must be a positive whole"):
            AlignmentCallback(model, kind, rows, tmp_path / "x.json", steps=steps)  # type: ignore[arg-type]
