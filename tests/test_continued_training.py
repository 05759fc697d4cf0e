"""Training that goes on from another run's inventory: zero-shot mu, more tasks, other phases."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import train_arguments
from transformers import AutoModelForSeq2SeqLM

import polyroute as pr
from polyroute.program.cli.app import main


def go_on(place: Path, out: str, *extra: str) -> list[str]:
    return [
        "train", "--start", str(place / "run"), "--data", str(place / "suite"), "--steps", "6",
        "--batch-size", "8", "--lr", "1e-3", "--out", str(place / out), *extra,
    ]  # fmt: skip


def loaded(place: Path, folder: Path) -> pr.RoutedModel:
    return pr.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(place / "base"), folder)


def test_the_average_goes_on_as_one_adapter(run: Path, place: Path) -> None:
    main(go_on(place, "mu", "--phase", "mu"))
    before, after = loaded(place, run), loaded(place, place / "mu")
    assert after.counts()["inventory"] == before.counts()["one_adapter"]
    assert after.routes.logits is None
    # A tiny rate leaves what training started from: the average of the run.
    main(go_on(place, "still", "--phase", "mu", "--steps", "1", "--lr", "1e-30"))
    still = loaded(place, place / "still")
    for one, other in zip(before.factors_of("mu"), still.factors_of("mu"), strict=True):
        torch.testing.assert_close(one.a, other.a)
        torch.testing.assert_close(one.b, other.b)
    moved = zip(before.factors_of("mu"), after.factors_of("mu"), strict=True)
    assert any(not torch.allclose(one.b, other.b) for one, other in moved)


def test_only_routes_move_in_phase_z(run: Path, place: Path) -> None:
    main(go_on(place, "z", "--phase", "z"))
    before, after = loaded(place, run), loaded(place, place / "z")
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.inventory.parameters(), after.inventory.parameters(), strict=True)
    )
    assert not torch.equal(before.routes.logits, after.routes.logits)


def test_a_new_task_joins(run: Path, place: Path) -> None:
    main(go_on(place, "more", "--tasks", "back,first"))
    after = loaded(place, place / "more")
    assert set(after.tasks) == {"back", "copy", "upper", "first"}
    before = loaded(place, run)
    assert torch.equal(after.routes["copy"], before.routes["copy"])  # was not in any batch


def test_a_continued_run_serves_every_command(run: Path, place: Path) -> None:
    if not (place / "mu" / "metrics.json").exists():
        main(go_on(place, "mu", "--phase", "mu"))
    main(["evaluate", str(place / "mu"), "--data", str(place / "suite"), "--zero-shot"])
    main(["adapt", str(place / "mu"), "--data", str(place / "suite"), "--tasks", "first",
          "--steps", "2", "--shots", "8", "--seeds", "0"])  # fmt: skip
    config = json.loads((place / "mu" / "run.json").read_text())["config"]
    assert config["model"] == str(place / "base")
    assert config["max_input"] == 32
    # A report tells runs apart by these; they are the inventory's, not the defaults of --method.
    assert [config[name] for name in ("method", "skills", "heads", "rank")] == ["mhr", 3, 4, 2]
    main([*go_on(place, "mu", "--phase", "mu"), "--resume"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--rank", "2"], "--rank comes from the run that --start names"),
        (["--model", "demo"], "--model comes from the run"),
        (["--phase", "zz"], "unknown phase 'zz'"),
        (["--start", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_go_on(
    run: Path,
    place: Path,
    extra: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(go_on(place, "bad", *extra))
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (place / "bad").exists()


def test_a_model_or_a_run_is_needed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train_arguments(place, "bad")
    with pytest.raises(SystemExit):
        main([a for a in arguments if a not in ("--model", str(place / "base"))])
    assert "name a base model with --model" in capsys.readouterr().err
