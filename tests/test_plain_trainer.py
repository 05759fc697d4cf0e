"""transformers' own Trainer is refused; RoutedTrainer in its place saves the inventory."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from base_models import llama, t5
from transformers import Trainer, TrainingArguments

from polyroute import InputError, MHRConfig, RoutedModel, attach, from_pretrained
from polyroute.host.trainers import ASKED, accepted, refuse_plain_trainer
from polyroute.trainer import RoutedTrainer

ROWS = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "tasks": "a"}] * 8)


def routed() -> RoutedModel:
    return attach(llama()[0], MHRConfig(num_skills=2, num_heads=2, rank=1), ["a"])


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    options = {
        "max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**options, **given})


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels")}
    return {"tasks": [row["tasks"] for row in rows], **tensors}


def test_a_routed_trainer_saves_what_from_pretrained_opens(tmp_path: Path) -> None:
    model = routed()
    trainer = RoutedTrainer(
        model, arguments(tmp_path), train_dataset=ROWS, eval_dataset=ROWS, data_collator=collate
    )
    before = [p.detach().clone() for p in model.inventory.parameters()]
    trainer.train()
    after = list(model.inventory.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "eval_loss" in trainer.evaluate()
    saved = from_pretrained(model.unload(), tmp_path / "checkpoint-2")
    for ours, theirs in zip(after, saved.inventory.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_plain_trainer_is_refused_before_it_trains(tmp_path: Path) -> None:
    model = routed()
    RoutedTrainer(model, arguments(tmp_path), train_dataset=ROWS, data_collator=collate)
    with pytest.raises(InputError, match=r"without its inventory: use polyroute\.MultiTaskTrainer"):
        Trainer(model, arguments(tmp_path), train_dataset=ROWS, data_collator=collate)


def test_the_question_of_the_plain_trainer_is_the_only_one_refused() -> None:
    with pytest.raises(InputError, match="RoutedTrainer"):
        refuse_plain_trainer(ASKED)
    refuse_plain_trainer("device")


def test_a_trainer_is_accepted_within_its_block_alone() -> None:
    model = routed()
    with accepted(model, loss_kwargs=False):
        assert getattr(model, ASKED) is False
    assert ASKED not in vars(model)


def test_transformers_still_asks_for_the_attribute(tmp_path: Path) -> None:
    asked = []

    class Watched(torch.nn.Linear):
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return super().__getattr__(name)

    Trainer(Watched(2, 2), arguments(tmp_path))
    assert ASKED in asked


def test_a_model_that_is_not_routed_and_columns_that_vanish_are_refused(tmp_path: Path) -> None:
    plain: Any = llama()[0]
    with pytest.raises(InputError, match="model must be routed"):
        RoutedTrainer(plain, arguments(tmp_path))
    with pytest.raises(InputError, match="remove_unused_columns must stay False"):
        RoutedTrainer(routed(), arguments(tmp_path, remove_unused_columns=True))


def test_smoothing_that_would_not_shift_the_labels_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="would compare each token with itself instead"):
        RoutedTrainer(routed(), args)
    of_t5 = attach(t5()[0], MHRConfig(num_skills=2, num_heads=2, rank=1), ["a"])

    def shifted(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        made = of_t5.base_model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return {**batch, "decoder_input_ids": made}

    trainer = RoutedTrainer(of_t5, args, train_dataset=ROWS, data_collator=shifted)
    batch = shifted(list(ROWS))
    with torch.no_grad():
        found = trainer.compute_loss(of_t5.eval(), dict(batch))
        logits = of_t5(**batch).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(found, expected)
    trainer.train()
