import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from launched import launch, losses, parts, shard_on_cpu, train, trainer
from safetensors.torch import load_file
from tiny_runs import train_arguments
from torch.distributed.tensor import DTensor

from polyroute import InputError
from polyroute.host.processes import index
from polyroute.model import RoutedModel
from polyroute.program.cli.app import main

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}


def of(folder: Path, base: str = "t5") -> RoutedModel:
    """The inventory in a folder, on an ordinary base model."""
    model, _, _ = parts(base=base)
    model.load_adapter(folder)
    return model


def check_equal(here: Path, there: Path, within: float = 1e-5, base: str = "t5") -> None:
    expected = of(there, base).state_dict()
    for name, tensor in of(here, base).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=within, atol=within)


def share(folder: Path, **values: Any) -> None:
    """As `train`, in one of two processes: with half of each batch."""
    values = {"per_device_train_batch_size": 4, **values}
    trained = train(folder, **values)
    if trained.args.process_index == 0:
        (folder / "losses").write_text(" ".join(map(str, losses(trained))))


@pytest.mark.parametrize("base", ["t5", "llama"])  # the second is packed
def test_two_processes_end_where_one_does(tmp_path: Path, base: str) -> None:
    alone = train(tmp_path / "alone", base=base)
    launch(share_values, tmp_path / "both", {"base": base})
    check_equal(tmp_path / "both", tmp_path / "alone", base=base)
    shared = [float(loss) for loss in (tmp_path / "both" / "losses").read_text().split()]
    assert shared == pytest.approx(losses(alone), abs=1e-4)


def test_a_sharded_base_model_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "alone", save_strategy="steps", save_steps=2)
    launch(share_sharded, tmp_path / "both")
    check_equal(tmp_path / "both", tmp_path / "alone")
    saved, same = (tmp_path / name / "checkpoint-4" for name in ("both", "alone"))
    check_equal(saved, same)
    description = "polyroute.json"  # with samples of the weights of the base model
    assert (saved / description).read_text().count("base_sample") > 2
    # What was saved under sharding goes on without, and the other way round.
    train(tmp_path / "on", resume=str(saved))
    check_equal(tmp_path / "on", tmp_path / "alone")
    launch(share_sharded, tmp_path / "back", str(same))
    check_equal(tmp_path / "back", tmp_path / "alone")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_table_trained_by_rows_in_two_processes_is_that_of_one(
    tmp_path: Path, accumulated: int
) -> None:
    values = {"rowwise_routes": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    values |= {"max_grad_norm": 0.01, "route_weight_decay": 0.1}  # rows count in the norm
    alone = {**values, "per_device_train_batch_size": 2 * accumulated}
    train(tmp_path / "alone", **alone)
    single = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 1}
    launch(share_values, tmp_path / "both", {**values, **single})
    check_equal(tmp_path / "both", tmp_path / "alone", within=1e-6)
    states = [
        torch.load(tmp_path / name / "checkpoint-6" / "optimizer.pt", weights_only=True)["table"]
        for name in ("alone", "both")
    ]
    torch.testing.assert_close(states[1], states[0], rtol=1e-6, atol=1e-6)
    assert len(set(states[0]["step"].tolist())) > 1  # each row has a clock of its own
    # What several processes saved goes on in one.
    train(tmp_path / "on", resume=str(tmp_path / "both" / "checkpoint-2"), **alone)
    check_equal(tmp_path / "on", tmp_path / "alone", within=1e-6)


def share_values(folder: Path, values: dict[str, Any]) -> None:
    share(folder, **values)


def test_rows_train_beside_a_sharded_base_model(tmp_path: Path) -> None:
    values = {"rowwise_routes": True, "per_device_train_batch_size": 2}
    train(tmp_path / "alone", **values)
    launch(share_sharded, tmp_path / "both", None, {**values, "per_device_train_batch_size": 1})
    check_equal(tmp_path / "both", tmp_path / "alone", within=1e-6)


def share_sharded(
    folder: Path, resume: str | None = None, values: Mapping[str, Any] = MappingProxyType({})
) -> None:
    shard_on_cpu()
    usual = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    trained = train(folder, resume, **SHARDED, **{**usual, **values})
    sharded = [p for p in trained.model.parameters() if isinstance(p.data, DTensor)]
    assert len(sharded) > 10
    assert not any(p.requires_grad for p in sharded)


def test_what_would_not_be_sharded_is_refused(tmp_path: Path) -> None:
    launch(refuse, tmp_path)
    for process in (0, 1):
        refusals = (tmp_path / f"{process}.txt").read_text()
        assert "shards over accelerators, and there are none" in refusals
        assert "needs something besides rows that trains" in refusals


def refuse(folder: Path) -> None:
    for settings in (SHARDED, {"rowwise_routes": True, "phase": "z"}):
        with pytest.raises(InputError) as refused:
            trainer(folder, **settings).train()
        with (folder / f"{index()}.txt").open("a") as file:
            print(refused.value, file=file)


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """A run of one process."""
    main(train_arguments(place, "alone"))
    return place / "alone"


def compare(here: Path, there: Path, expected: Sequence[str]) -> None:
    """The same files, with the same tensors up to rounding."""
    files = {path.relative_to(there) for path in there.rglob("*.safetensors")}
    assert {path.relative_to(here) for path in here.rglob("*.safetensors")} == files
    assert set(expected) <= {path.name for path in files}
    for path in files:
        check_files(here / path, there / path)


def command(output: Path, arguments: list[str]) -> None:
    with (output / f"{index()}.txt").open("w") as file, redirect_stdout(file):
        main(arguments)


def test_a_command_in_two_processes_is_that_of_one(
    place: Path, alone: Path, tmp_path: Path
) -> None:
    launch(command, tmp_path, train_arguments(place, "both"))
    assert "the inventory is in" in (tmp_path / "0.txt").read_text()
    assert not (tmp_path / "1.txt").read_text()
    here, there = place / "both", alone
    check_files(here / "inventory.safetensors", there / "inventory.safetensors")
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (here, there)]
    logged = [[e["loss"] for e in each["log"] if "loss" in e] for each in metrics]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    # Interrupted after step 8 in two processes, and taken up in one.
    for name in ("polyroute.json", "metrics.json", "inventory.safetensors"):
        (here / name).unlink()
    shutil.rmtree(here / "checkpoint-12")
    main([*train_arguments(place, "both"), "--resume"])
    check_files(here / "inventory.safetensors", there / "inventory.safetensors")


def test_a_batch_that_cannot_be_shared_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        main(train_arguments(place, "three"))
    assert "--batch-size 8 cannot be shared by 3 processes" in capsys.readouterr().err
    assert not (place / "three").exists()


REFUSING = """
import os, sys
import polyroute.program.commands.{command} as module
from polyroute.errors import InputError
from polyroute.program.cli.app import main

def refuse(*given, **named):
    raise InputError("this process has other rows")

if os.environ["RANK"] == "1":
    module.{function} = refuse
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("function", ["load_suite", "plan"])
def test_a_process_that_refuses_its_input_ends_all(
    place: Path, alone: Path, tmp_path: Path, function: str
) -> None:
    command, words = "train", train_arguments(place, "refused")
    if function == "plan":
        command, function = "adapt", "_check_model"
        words = ["adapt", str(alone), "--data", str(place / "suite"), "--tasks", "first,pick",
                 "--steps", "2", "--shots", "6", "--out", str(place / "refused")]  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(REFUSING.format(command=command, function=function))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, **settings},
    )  # fmt: skip
    assert ended.returncode
    assert "polyroute: error: this process has other rows" in ended.stderr
    assert "SIGKILL" not in ended.stderr  # which comes after half a minute
    assert not (place / "refused").exists()


def test_two_processes_adapt_a_share_each(place: Path, alone: Path) -> None:
    def words(out: str) -> list[str]:
        grid = ["--grid", "lr=0.001,0.01", "--seeds", "0,1,2", "--steps", "4", "--shots", "6"]
        return ["adapt", str(alone), "--data", str(place / "suite"), "--tasks", "first,pick",
                *grid, "--out", str(place / out)]  # fmt: skip

    def results(out: str) -> list[dict[str, Any]]:
        found = json.loads((place / out / "results.json").read_text())
        return [{k: v for k, v in result.items() if k != "seconds"} for result in found]

    main(words("one"))
    launch(main, words("two"))
    expected = [pytest.approx(result, rel=1e-4) for result in map(numbers, results("one"))]
    assert list(map(numbers, results("two"))) == expected
    assert [names(r) for r in results("two")] == [names(r) for r in results("one")]
    assert len(expected) == 12
    assert not (place / "two" / ".running").exists()
    kept = ["adapter_model.safetensors"]
    compare(place / "two", place / "one", kept)

    # Interrupted: the first process had ended two slots, the second one of its own.
    whole = json.loads((place / "two" / "results.json").read_text())
    (place / "two" / ".running").mkdir()
    (place / "two" / "results.json").write_text(json.dumps(whole[:3:2]))
    (place / "two" / ".running" / "results-1.json").write_text(json.dumps(whole[1:2]))
    shutil.rmtree(place / "two" / "pick")
    main([*words("two"), "--resume"])
    assert list(map(numbers, results("two"))) == expected
    compare(place / "two", place / "one", kept)


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in result.items() if isinstance(v, int | float)}


def names(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if not isinstance(v, int | float)}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("base", ["t5", "llama"])
@pytest.mark.parametrize(
    "values",
    [
        {"objective": "t-few"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"optim": "adafactor", "cap": 7, "temperature": 2.0, "max_steps": 7},
        {"phase": "mu", "activation_checkpointing": True},
        {"phase": "z", "accelerator_config": {"split_batches": True},
         "per_device_train_batch_size": 8},
    ],
)  # fmt: skip
def test_whatever_the_settings(
    tmp_path: Path, values: dict[str, Any], base: str, sharded: bool
) -> None:
    alone = {k: v for k, v in values.items() if k not in ("gradient_accumulation_steps",)}
    train(tmp_path / "alone", **{**alone, "per_device_train_batch_size": 8, "base": base})
    launch(share_with, tmp_path / "both", {**values, "base": base, **(SHARDED if sharded else {})})
    # Adafactor divides by the root of a gradient's square, so it enlarges the rounding of the few
    # that are nearly zero, up to a step's size (1e-3); so does one process that accumulates.
    few, within = (0.1, 1e-3) if values.get("optim") == "adafactor" else (0.0, 1e-5)
    expected = load_file(tmp_path / "alone" / "inventory.safetensors")
    for name, tensor in load_file(tmp_path / "both" / "inventory.safetensors").items():
        gap = (tensor - expected[name]).abs() - 1e-5 * expected[name].abs()
        assert gap.max() <= within, name
        assert (gap > 1e-5).float().mean() <= few, name


def share_with(folder: Path, values: dict[str, Any]) -> None:
    shard_on_cpu()
    share(folder, **values)


def check_files(here: Path, there: Path) -> None:
    expected = load_file(there)
    for name, tensor in load_file(here).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
