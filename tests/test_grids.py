"""Several settings in one run of `polyroute adapt`."""

import json
from pathlib import Path

import pytest
from commands_run import Capture, adapt, refused

from polyroute.program.cli.app import main


def adaptation(place: Path, run: Path, out: Path, *extra: str) -> list[str]:
    """One task, one seed."""
    given = adapt(place, run, str(out), "--tasks", "pick", "--shots", "4", "--steps", "1")
    return [*given, "--seeds", "0", "--optimizer", "adamw", "--lr", "0.001", *extra]


def test_a_config_may_hold_a_grid_and_memory_may_change_on_resume(
    place: Path, run: Path, tmp_path: Path
) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "x"
    config.write_text("grid: ['lr=0.001,0.01', 'steps=1,2']\nphase: full\nmemory: 1GB\n")
    main(adaptation(place, run, out, "--config", str(config)))
    labels = [result["label"] for result in json.loads((out / "results.json").read_text())]
    assert sorted(labels) == sorted(f"lr={lr},steps={n}" for lr in (0.001, 0.01) for n in (1, 2))
    assert (out / "pick" / "seed-0" / "lr=0.01,steps=2" / "adapter_model.safetensors").exists()
    main(adaptation(place, run, out, "--config", str(config), "--memory", "2GB", "--resume"))


def test_a_setting_that_diverges_is_left_out_and_reported(
    place: Path, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "x"
    arguments = adaptation(place, run, out, "--grid", "lr=0.01,1e37", "--steps", "4")
    main(arguments)
    by_label = {r["label"]: r for r in json.loads((out / "results.json").read_text())}
    assert by_label["lr=0.01"]["score"] is not None
    assert by_label["lr=1e+37"]["score"] is None
    assert by_label["lr=1e+37"]["diverged_at"] is not None
    assert "diverged and left out: 1 of 2" in capsys.readouterr().out
    main([*arguments, "--resume"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--grid", "lr"], "must be a setting and values"),
        (["--grid", "lr=0.1", "--grid", "lr=0.2"], "names 'lr' twice"),
        (["--grid", "lr=abc"], "lr must be a finite number"),
        (["--grid", "steps=1e2"], "steps must be a positive whole number"),
        (["--grid", "phase=z,mu"], "phase cannot vary"),
        (["--memory", "lots"], "memory must be a size"),
        (["--memory", "1KB"], "too small"),
        (["--patience", "2"], "set validation_shots"),
        (["--optimizer", "adam"], "did you mean 'adamw'"),
    ],
)
def test_bad_grids_and_sizes_end_in_one_sentence(
    place: Path, run: Path, tmp_path: Path, capsys: Capture,
    arguments: list[str], sentence: str,
) -> None:  # fmt: skip
    assert sentence in refused(adaptation(place, run, tmp_path / "x", *arguments), capsys)
    assert not (tmp_path / "x" / "results.json").exists()
