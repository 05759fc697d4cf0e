"""Training that comes to no numbers: what it says, what it keeps, and what it skips."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands_run import Capture, read, refused
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import arguments, parts
from torch import Tensor

from polyroute import InputError, RoutedModel
from polyroute.kinds.base import ModelKind
from polyroute.program.cli.app import main
from polyroute.trainer import MultiTaskTrainer
from polyroute.training.divergence import Watch
from polyroute.training.whole_run import WholeRun

__all__ = ["parts"]

Parts = tuple[RoutedModel, ModelKind, Dataset]


class Spoilt(MultiTaskTrainer):
    """Has a loss that is no number, or that has no finite gradient, at certain steps."""

    at: tuple[int, ...] = ()
    by: float = math.nan

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.by if self.state.global_step + 1 in self.at else loss


@pytest.fixture(params=[math.nan, math.inf], ids=["nan", "inf"])
def spoilt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Spoilt]:
    monkeypatch.setattr(Spoilt, "by", request.param)
    return Spoilt


def is_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_the_last_good_checkpoint_stays(spoilt: type[Spoilt], parts: Parts, tmp_path: Path) -> None:
    model, kind, rows = parts
    args = arguments(
        tmp_path,
        max_steps=9,
        save_steps=1,
        save_total_limit=2,
        logging_steps=9,
        learning_rate=0.125,
    )
    trainer = spoilt(model, kind, args, rows)
    trainer.at = (5,)
    sentence = r"step 5 on \S+.* is not finite, with skills at 0\.\d+, routes at 0\.\d+; lower"
    with pytest.raises(InputError, match=sentence) as error:
        trainer.train()
    assert any(task in str(error.value) for task in model.tasks)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    assert is_finite(load_file(tmp_path / "checkpoint-4" / "inventory.safetensors"))


def test_a_step_is_noticed_however_seldom_it_is_looked_for(
    spoilt: type[Spoilt], parts: Parts, tmp_path: Path
) -> None:
    model, kind, rows = parts
    trainer = spoilt(model, kind, arguments(tmp_path, max_steps=6, logging_steps=6), rows)
    trainer.at = (2, 3)
    with pytest.raises(InputError, match="of step 2 on"):
        trainer.train()


def test_skipped_steps_change_nothing(spoilt: type[Spoilt], parts: Parts, tmp_path: Path) -> None:
    model, kind, rows = parts
    args = arguments(tmp_path, max_steps=4, save_steps=1, on_nan="skip")
    trainer = spoilt(model, kind, args, rows)
    trainer.at = (3,)
    trainer.train()
    assert trainer.watch.skipped == 1
    second, third, fourth = (
        load_file(tmp_path / f"checkpoint-{step}" / "inventory.safetensors") for step in (2, 3, 4)
    )
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert is_finite(fourth)
    assert not all(torch.equal(third[name], fourth[name]) for name in third)


def test_skipping_ends_where_nothing_else_happens(parts: Parts, tmp_path: Path) -> None:
    model, kind, rows = parts
    trainer = Spoilt(model, kind, arguments(tmp_path, max_steps=40, on_nan="skip"), rows)
    trainer.at = tuple(range(5, 40))
    with pytest.raises(InputError, match="the last 10 steps were skipped"):
        trainer.train()
    assert trainer.state.global_step == 13


def test_what_to_do_is_checked(parts: Parts, tmp_path: Path) -> None:
    model, kind, rows = parts
    with pytest.raises(InputError, match="on_nan='ignore' is not one of"):
        MultiTaskTrainer(model, kind, arguments(tmp_path, on_nan="ignore"), rows)


def train(place: Path, out: Path, *extra: str) -> list[str]:
    return ["train", "--model", str(place / "base"), "--data", str(place / "suite"), "--out",
            str(out), "--steps", "6", "--save-steps", "1", "--quiet", *extra]  # fmt: skip


def test_a_huge_rate_leaves_no_bad_checkpoint(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    sentence = refused(train(place, out, "--lr", "1e37", "--route-lr", "1e37"), capsys)
    assert "training diverged" in sentence
    assert "--lr" in sentence
    for path in out.glob("checkpoint-*/inventory.safetensors"):
        assert is_finite(load_file(path))
    assert not (out / "metrics.json").exists()


def test_skipped_steps_are_counted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyroute.program.commands.training.MultiTaskTrainer", Spoilt)
    monkeypatch.setattr(Spoilt, "at", (2, 4))
    main(train(place, tmp_path / "run", "--on-nan", "skip"))
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["skipped_steps"] == 2
    losses = {entry["step"]: entry["loss"] for entry in metrics["log"] if "loss" in entry}
    taken = [loss for loss in losses.values() if loss is not None]
    assert [step for step, loss in losses.items() if loss is None] == [2, 4]
    assert metrics["train_loss"] == pytest.approx(sum(taken) / len(taken))


def test_the_mean_loss_is_that_of_finite_losses_whatever_the_log_and_the_resumption() -> None:
    losses = [1.0, math.nan, 3.0, math.inf, math.nan, 8.0]
    for cut in range(7):
        whole = WholeRun()
        seen = []
        for step, loss in enumerate(losses, start=1):
            if step == cut:
                kept, whole = json.loads(json.dumps(whole.kept())), WholeRun()
                whole.go_on(kept, step - 1)
            whole.see(torch.tensor(loss), fills=True)
            if step in (3, 5):
                seen.append(whole.mean_since_log(step))
        assert seen[0] == 2.0
        assert math.isnan(seen[1])
        assert whole.metrics(6, 1)["train_loss"] == pytest.approx((2.0 * 3 + 8.0) / 4)


def test_a_trainer_can_go_on_after_it_was_told(parts: Parts, tmp_path: Path) -> None:
    model, kind, rows = parts
    args = arguments(tmp_path, max_steps=7, save_steps=2)
    trainer = Spoilt(model, kind, args, rows)
    trainer.at = (5,)
    with pytest.raises(InputError, match="step 5"):
        trainer.train()
    trainer.at = ()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 7


def test_skipped_steps_are_counted_across_a_resumption(parts: Parts, tmp_path: Path) -> None:
    model, kind, rows = parts
    args = arguments(tmp_path, max_steps=4, save_steps=2, on_nan="skip")
    trainer = Spoilt(model, kind, args, rows)
    trainer.at = (2,)
    trainer.train()
    again = MultiTaskTrainer(model, kind, arguments(tmp_path, max_steps=6, on_nan="skip"), rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.watch.skipped == 1


def test_a_gradient_scaler_is_left_to_search(parts: Parts, tmp_path: Path) -> None:
    model, _, _ = parts
    for watch in (Watch(model, "stop"), Watch(model, "skip")):
        for parameter in model.learned():
            parameter.grad = torch.full_like(parameter, torch.inf)
        args, state = SimpleNamespace(fp16=True), SimpleNamespace(global_step=0)
        watch.on_pre_optimizer_step(args, state, None)  # type: ignore[arg-type]
        watch.check()
        assert watch.skipped == 0
