from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from base_models import EXAMPLES, made, t5
from datasets import Dataset
from models import routed
from transformers import TrainingArguments

from polyroute import InputError, MHRConfig, RoutedModel, attach
from polyroute.kinds.base import ModelKind
from polyroute.routes.row_optimizer import RowAdamW
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments


@pytest.fixture
def parts() -> tuple[RoutedModel, ModelKind, Dataset]:
    wrapper, kind = made(t5)
    model = routed(wrapper.base_model, ("where", "truth", "count"), num_heads=4)
    rows = Dataset.from_dict(kind.encode(EXAMPLES), features=kind.features).sort("task")
    return model, kind, rows


def arguments(folder: Path, **values: Any) -> MultiTaskTrainingArguments:
    usual = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    return MultiTaskTrainingArguments(str(folder), **{**usual, **values})


def test_several_evaluation_sets_are_scored_by_name(parts: Any, tmp_path: Path) -> None:
    model, kind, rows = parts
    sets = {"all": rows, "few": rows.select(range(2))}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer = MultiTaskTrainer(model, kind, args, rows, sets)
    trainer.train()
    assert {"eval_all_loss", "eval_few_loss"} <= trainer.evaluate().keys()
    assert any("eval_few_loss" in entry for entry in trainer.state.log_history)
    unknown = rows.map(lambda row: {**row, "task": "oak"})
    with pytest.raises(InputError, match="unknown task 'oak'"):
        MultiTaskTrainer(model, kind, args, rows, {"all": rows, "other": unknown})
    with pytest.raises(InputError, match=r"eval_dataset\['few'\] must be a datasets.Dataset"):
        MultiTaskTrainer(model, kind, args, rows, {"few": list(rows)})


def test_a_trainer_may_have_no_training_rows(parts: Any, tmp_path: Path) -> None:
    model, kind, rows = parts
    trainer = MultiTaskTrainer(model, kind, arguments(tmp_path), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 0


def test_what_cannot_be_trained_is_refused(parts: Any, tmp_path: Path) -> None:
    model, kind, rows = parts
    args = arguments(tmp_path)
    refused: list[tuple[Any, Any, Any, str]] = [
        (model.base_model, args, rows, "model must be routed, not a T5ForConditionalGeneration"),
        (model, TrainingArguments(str(tmp_path)), rows, "must be MultiTaskTrainingArguments, not"),
        (model, arguments(tmp_path, remove_unused_columns=True), rows, "must stay False"),
        (model, arguments(tmp_path, label_smoothing_factor=0.1), rows, "has no effect"),
        (model, args, list(rows), "train_dataset must be a datasets.Dataset .*not a list"),
        (model, args, rows.remove_columns("task"), "Dataset without the column 'task'"),
    ]
    without = attach(t5()[0], MHRConfig(num_skills=2), [])
    for some in (rows, None):
        refused.append((without, args, some, "has no tasks: add those of the rows with model.add"))
    for one, arguments_, data, message in refused:
        with pytest.raises(InputError, match=message):
            MultiTaskTrainer(one, kind, arguments_, data)


@pytest.mark.parametrize(("hook", "message"), [
    ("compute_metrics", "score answers with polyroute.evaluate"),
    ("preprocess_logits_for_metrics", "score answers with polyroute.evaluate"),
    ("compute_loss_func", "the kind computes the loss: give it an objective"),
    ("data_collator", "the kind makes the batches"),
    ("optimizer_cls_and_kwargs", "args.optim names the optimizer"),
])  # fmt: skip
def test_what_trainer_would_not_use_is_refused(
    parts: Any, tmp_path: Path, hook: str, message: str
) -> None:
    model, kind, rows = parts
    with pytest.raises(InputError, match=f"{hook} would not be used: .*{message}"):
        MultiTaskTrainer(model, kind, arguments(tmp_path), rows, **{hook: print})


def test_an_order_of_rows_that_tasks_would_override_is_refused(parts: Any, tmp_path: Path) -> None:
    model, kind, rows = parts
    args = arguments(tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(InputError, match="'group_by_length' has no effect: temperature and cap"):
        MultiTaskTrainer(model, kind, args, rows)


BEST: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True,
}  # fmt: skip


@pytest.mark.parametrize(("metric", "several"), [
    (None, False), ("loss", False), ("eval_loss", False), ("few_loss", True),
    ("eval_all_loss", True),
])  # fmt: skip
def test_the_best_model_is_that_of_the_least_loss(
    parts: Any, tmp_path: Path, metric: str | None, several: bool
) -> None:
    model, kind, rows = parts
    sets = {"all": rows, "few": rows.select(range(2))} if several else rows
    args = arguments(tmp_path, **BEST, metric_for_best_model=metric)
    trainer = MultiTaskTrainer(model, kind, args, rows, sets)
    trainer.train()
    assert trainer.state.best_metric is not None


@pytest.mark.parametrize(("metric", "several"), [
    ("accuracy", False), ("eval_accuracy", True), (None, True), ("loss", True), ("all_loss", False),
])  # fmt: skip
def test_a_best_model_by_what_is_not_measured_is_refused_before_training(
    parts: Any, tmp_path: Path, metric: str | None, several: bool
) -> None:
    model, kind, rows = parts
    sets = {"all": rows, "few": rows.select(range(2))} if several else rows
    args = arguments(tmp_path, **BEST, metric_for_best_model=metric)
    with pytest.raises(InputError, match=r"best_model='\w+' is not measured, .*'eval_\w*loss'"):
        MultiTaskTrainer(model, kind, args, rows, sets)


def test_a_subclass_may_measure_more(parts: Any, tmp_path: Path) -> None:
    class Measured(MultiTaskTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {**super().evaluate(*args, **kwargs), "eval_accuracy": 0.5}

    model, kind, rows = parts
    args = arguments(tmp_path, **BEST, metric_for_best_model="accuracy")
    trainer = Measured(model, kind, args, rows, rows)
    trainer.train()
    assert trainer.state.best_metric == 0.5


def test_predictions_are_refused(parts: Any, tmp_path: Path) -> None:
    model, kind, rows = parts
    with pytest.raises(InputError, match=r"no predict: .*polyroute\.evaluate"):
        MultiTaskTrainer(model, kind, arguments(tmp_path), rows).predict(rows)


def test_a_merged_model_is_not_trained(parts: Any, tmp_path: Path) -> None:
    model, kind, rows = parts
    args = arguments(tmp_path)
    trainer = MultiTaskTrainer(model, kind, args, rows)
    model.merge("truth")
    with pytest.raises(InputError, match=r"merged with 'truth'; call unmerge\(\) first"):
        trainer.train()
    with pytest.raises(InputError, match=r"merged with 'truth'; call unmerge\(\) first"):
        MultiTaskTrainer(model, kind, args, rows)
    model.unmerge()
    assert trainer.train().global_step == 2


def parts_of(seed: int = 1) -> tuple[RoutedModel, ModelKind, Dataset]:
    wrapper, kind = made(t5)
    tasks = ("where", "truth", "count")
    model = routed(wrapper.base_model, tasks, num_heads=4, seed=seed)
    rows = Dataset.from_dict(kind.encode(EXAMPLES), features=kind.features).sort("task")
    return model, kind, rows


ROWWISE: dict[str, Any] = {
    "rowwise_routes": True, "max_steps": 6, "save_steps": 3, "weight_decay": 0.1,
    "route_weight_decay": 0.1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.01,
    "warmup_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 1,
}  # fmt: skip


def test_a_table_trained_by_rows_resumes_to_the_same_end(tmp_path: Path) -> None:
    model, kind, rows = parts_of()
    trainer = MultiTaskTrainer(model, kind, arguments(tmp_path, **ROWWISE), rows)
    trainer.train()
    assert isinstance(trainer.create_optimizer(), RowAdamW | AcceleratedOptimizer)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 6
    assert all(norm > 0.01 for norm in norms)
    again, kind, rows = parts_of(seed=2)
    resumed = MultiTaskTrainer(again, kind, arguments(tmp_path, **ROWWISE), rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("restored", [False, True])
def test_losses_of_a_resumed_training_are_those_of_an_unbroken_one(
    tmp_path: Path, restored: bool
) -> None:
    given: dict[str, Any] = {
        "max_steps": 9, "save_steps": 4, "logging_steps": 3, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "restore_callback_states_from_checkpoint": restored,
    }  # fmt: skip
    model, kind, rows = parts_of()
    trainer = MultiTaskTrainer(model, kind, arguments(tmp_path, **given), rows)
    whole = trainer.train()
    again, kind, rows = parts_of(seed=2)
    resumed = MultiTaskTrainer(again, kind, arguments(tmp_path, **given), rows)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    losses = [
        [entry["loss"] for entry in one.state.log_history if "loss" in entry]
        for one in (trainer, resumed)
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    means = [whole.training_loss, whole.metrics["train_loss"], output.training_loss]
    assert means == [sum(losses[0]) / 3] * 3
    assert output.metrics.keys() == whole.metrics.keys()


def test_a_task_that_is_never_drawn_is_left_alone_by_rows(tmp_path: Path) -> None:
    model, kind, rows = parts_of()
    model.add_task("idle")
    before = model.state_dict()["routes.logits"].clone()
    args = arguments(tmp_path, rowwise_routes=True, route_weight_decay=0.5)
    MultiTaskTrainer(model, kind, args, rows).train()
    after = model.state_dict()["routes.logits"]
    assert torch.equal(after[3], before[3])
    assert not torch.equal(after, before)


def test_what_cannot_be_trained_by_rows_is_refused(tmp_path: Path) -> None:
    model, kind, rows = parts_of()
    args = arguments(tmp_path, rowwise_routes=True, optim="adafactor")
    with pytest.raises(InputError, match="rowwise_routes is an AdamW, which optim='adafactor' is"):
        MultiTaskTrainer(model, kind, args, rows)
