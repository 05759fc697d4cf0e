from pathlib import Path
from typing import Any

import pytest
from base_models import EXAMPLES, made, t5
from datasets import Dataset
from models import routed
from transformers import TrainingArguments

from polyroute import InputError, RoutedModel
from polyroute.kind import ModelKind
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
    for one, arguments_, data, message in refused:
        with pytest.raises(InputError, match=message):
            MultiTaskTrainer(one, kind, arguments_, data)


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
