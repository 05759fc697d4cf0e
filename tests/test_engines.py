"""What `TrainingArguments` offers, with the trainer of routed models."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launched import losses, parts, train, trainer
from safetensors.torch import load_file
from tiny_runs import write_base, write_suite
from transformers import EarlyStoppingCallback, TrainerCallback

from polyroute import InputError
from polyroute.trainer import MultiTaskTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def check_equal(here: Path, there: Path) -> None:
    expected = load_file(there / "inventory.safetensors")
    for name, tensor in load_file(here / "inventory.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["lm", "t-few"])
def test_micro_batches_are_one_batch(tmp_path: Path, objective: str) -> None:
    # Targets differ in length, so means of micro-batches would not be the mean of the batch; and
    # the last step of an epoch has 6 of 8 rows.
    whole = train(tmp_path / "whole", objective=objective)
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parted = train(tmp_path / "parted", objective=objective, **values)
    check_equal(tmp_path / "parted", tmp_path / "whole")
    assert losses(parted) == pytest.approx(losses(whole), rel=1e-4)


def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    settings = {"base": "llama", "dtype": torch.float32}  # a T5 this small amplifies rounding
    wide, narrow = (losses(train(tmp_path / name, bf16=name == "b", **settings)) for name in "ab")
    assert narrow == pytest.approx(wide, rel=0.01)
    assert narrow != wide
    saved = load_file(tmp_path / "b" / "inventory.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_resumed_run_ends_where_it_would_have(tmp_path: Path) -> None:
    train(tmp_path / "run", save_strategy="steps", save_steps=2)
    train(tmp_path / "again", resume=str(tmp_path / "run" / "checkpoint-2"))
    check_equal(tmp_path / "again", tmp_path / "run")
    base = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoint-2").glob("*safetensors"))
    assert base < sum(p.nbytes for p in parts()[0].parameters())


def test_the_best_of_the_evaluated_comes_back(tmp_path: Path) -> None:
    values = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trained = train(
        tmp_path, learning_rate=30.0, load_best_model_at_end=True, eval_on_start=True, **values
    )
    looks = {e["step"]: e["eval_loss"] for e in trained.state.log_history if "eval_loss" in e}
    best = min((loss, step) for step, loss in looks.items() if step)
    assert best[0] < looks[5]
    assert trained.evaluate()["eval_loss"] == pytest.approx(best[0], rel=1e-5)
    check_equal(tmp_path, tmp_path / f"checkpoint-{best[1]}")


def test_tensorboard_hears_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trained = train(tmp_path, report_to=["tensorboard"])
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.*")).parent))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(losses(trained))


def test_wandb_hears_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained = train(tmp_path, report_to=["wandb"])
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/loss"] == pytest.approx(losses(trained)[-1])
    assert list(tmp_path.rglob("*.wandb"))


def test_callbacks_are_called_and_can_stop(tmp_path: Path) -> None:
    seen: list[str] = []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(f"{state.global_step} {type(kwargs['model']).__name__}")

    values = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    stopped = trainer(tmp_path, learning_rate=30.0, load_best_model_at_end=True, **values)
    stopped.add_callback(Note())
    stopped.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    stopped.train()
    assert seen == [f"{step} RoutedModel" for step in range(1, stopped.state.global_step + 1)]
    assert stopped.state.global_step < 5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training without further settings comes to."""
    folder = tmp_path_factory.mktemp("plain")
    train(folder)
    return folder


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow
        ),
        {"neftune_noise_alpha": 0.0},
        {"activation_checkpointing": True},
        {"dataloader_num_workers": 1},
        {"auto_find_batch_size": True},
    ],
)
def test_settings_that_change_no_number(
    tmp_path: Path, plain: Path, values: dict[str, Any]
) -> None:
    assert train(tmp_path, **values).state.global_step == 5
    check_equal(tmp_path, plain)


def test_other_optimizers_and_schedules_train(tmp_path: Path) -> None:
    other = trainer(tmp_path, optim="sgd", lr_scheduler_type="cosine", learning_rate=0.1)
    before = other.evaluate()["eval_loss"]
    other.train()
    assert other.evaluate()["eval_loss"] < before


class Hub:
    """Notes what is uploaded."""

    def __init__(self) -> None:
        self.uploaded: list[set[str]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"user/{name}")

    def upload_folder(self, folder_path: str, ignore_patterns: Any = None, **_: Any) -> Any:
        self.uploaded.append({path.name for path in Path(folder_path).iterdir()})
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def test_pushing_uploads_the_inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.modelcard.model_info", None, raising=False)
    values = {"save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
    pushing = trainer(tmp_path, push_to_hub=True, hub_model_id="inventory", **values)
    pushing.train()
    pushing.push_to_hub()
    files = {"polyroute.json", "inventory.safetensors"}
    assert len(hub.uploaded) == 4  # after steps 2, 4 and 5, and by name
    assert all(files <= names for names in hub.uploaded)
    assert "README.md" in hub.uploaded[-1]


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = MultiTaskTrainer.create_accelerator_and_postprocess

    def with_deepspeed(self: MultiTaskTrainer) -> None:
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(MultiTaskTrainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(InputError, match=r"DeepSpeed is not supported: .* use FSDP2"):
        trainer(tmp_path)


def test_several_gpus_in_one_process_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyroute.trainer import MultiTaskTrainingArguments

    monkeypatch.setattr(MultiTaskTrainingArguments, "n_gpu", 2)
    with pytest.raises(InputError, match=r"one process cannot train on 2 GPUs: .* torchrun"):
        trainer(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_suite(folder / "suite")
    write_base(folder / "base")
    return folder


@pytest.mark.parametrize("name", ["plain_loop", "lightning_recipe"])
def test_the_examples_train_what_can_be_loaded(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("lightning") and importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    monkeypatch.chdir(tmp_path)
    path = EXAMPLES / f"{name}.py"
    words = [str(place / "base"), str(place / "suite"), str(tmp_path / "out"), "3"]
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    runpy.run_path(str(path), run_name="__main__")
    saved = load_file(tmp_path / "out" / "inventory.safetensors")
    assert any(t.abs().max() > 0 for n, t in saved.items() if n.endswith("lora_b"))
    checkpoints = list(tmp_path.rglob("*.ckpt"))
    assert bool(checkpoints) == name.startswith("lightning")
    for checkpoint in checkpoints:
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert state
        assert not any("base_model" in key for key in state)
