"""A setting is declared once: what the command line, files and runs know of it follows."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from tiny_runs import train_arguments
from typer.testing import CliRunner

from polyroute.adapting import settings as adapting
from polyroute.adapting.settings import AdaptSettings, variants
from polyroute.config import MHRConfig, Phase
from polyroute.errors import InputError
from polyroute.exchange import READ, WRITTEN
from polyroute.optimizers import OPTIMIZERS
from polyroute.program.cli.app import COMMANDS, app, main
from polyroute.program.cli.command import Command
from polyroute.program.commands.adapt import adapt_run
from polyroute.program.commands.train import train_run
from polyroute.program.options.adapt import AdaptOptions
from polyroute.program.options.flags import flags_of, group
from polyroute.program.options.train import TrainOptions
from polyroute.settings import number, option_of, setting


@dataclass(frozen=True, kw_only=True)
class WiderConfig(MHRConfig):
    """`MHRConfig` with one more setting."""

    gate_sharpness: float = setting(
        1.0, number(above=0), option="sharpness", help="How sharp gates are."
    )


@dataclass(frozen=True, kw_only=True)
class WiderTraining(TrainOptions):
    adapter: WiderConfig = group(WiderConfig, from_start=True)


@dataclass(frozen=True, kw_only=True)
class WiderSettings(AdaptSettings):
    """`AdaptSettings` with one more setting."""

    slot_noise: float = setting(0.0, number(least=0), help="Noise of a slot's gradients.")


@dataclass(frozen=True, kw_only=True)
class WiderAdaptation(AdaptOptions):
    settings: WiderSettings = group(WiderSettings, defaults={"shots": 32})


TRAIN = Command("train", WiderTraining, train_run)
ADAPT = Command("adapt", WiderAdaptation, adapt_run)
GIVEN = ("--model", "m", "--data", "d", "--out", "o")


def program(command: Command[Any]) -> typer.Typer:
    """A program of this command alone."""
    made = typer.Typer(add_completion=False)
    command.add_to(made)
    return made


def options(command: Command[Any], *arguments: str) -> Any:
    """What a command line comes to."""
    parsed: Any = typer.main.get_command(program(command))
    return command.read(parsed.make_context(command.name, list(arguments)))


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------ every setting


@pytest.mark.parametrize(
    ("record", "command"), [(MHRConfig, TrainOptions), (AdaptSettings, AdaptOptions)]
)
def test_every_setting_is_a_flag_with_help(record: Any, command: Any) -> None:
    flags = {flag.name: flag for flag in flags_of(command)}
    for one in fields(record):
        assert flags[option_of(one)].marks["help"] == one.metadata["help"] != ""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_flag_is_declared_twice_and_each_is_explained(command: Command[Any]) -> None:
    names = [flag.name for flag in command.flags]
    assert len(set(names)) == len(names)
    assert all(flag.marks["help"] for flag in command.flags)
    assert command.work.__doc__
    assert f"polyroute {command.name}" in command.work.__doc__


def test_what_goes_on_from_a_run_takes_base_model_and_adapter_from_it() -> None:
    fixed = {flag.name for flag in flags_of(TrainOptions) if flag.marks.get("from_start")}
    adapter = {option_of(one) for one in fields(MHRConfig)}
    assert fixed == {"model", "dtype", "max_input", "max_target", "prompt", "system", *adapter}


def test_a_value_that_is_completed_is_one_that_is_known() -> None:
    completed = {
        (command.name, flag.name): flag.marks.get("values")
        for command in COMMANDS
        for flag in command.flags
    }
    assert completed["adapt", "optimizer"] == OPTIMIZERS == adapting.OPTIMIZERS
    assert completed["adapt", "phase"] == get_args(Phase)
    assert completed["export", "format"] == WRITTEN
    assert completed["import", "format"] == (*READ, "library")


def test_lists_of_names_are_separated_by_commas() -> None:
    train = next(command for command in COMMANDS if command.name == "train")
    found = options(
        train, *GIVEN, "--modules-to-save", "classifier,norm", "--target", "q, v",
        "--exclude", r".*\.0\..*", "--combine", "output",
    )  # fmt: skip
    assert found.adapter.modules_to_save == ("classifier", "norm")
    assert found.adapter.target_modules == ("q", "v")
    assert found.adapter.exclude_modules == r".*\.0\..*"
    assert found.adapter.combine == "output"
    assert found.given.recorded["modules_to_save"] == ["classifier", "norm"]
    plain = options(train, *GIVEN)
    assert plain.adapter == MHRConfig()
    assert plain.given.recorded["skills"] is None  # as it was given, before the method fills it in


# ------------------------------------------------------------------ one more setting


def test_a_new_setting_of_the_adapter_is_a_flag_with_a_check_and_help() -> None:
    shown = CliRunner().invoke(program(TRAIN), ["--help"], env={"COLUMNS": "200"}).output
    assert "--sharpness" in shown
    assert "How sharp gates are." in shown
    found = options(TRAIN, *GIVEN, "--sharpness", "2")
    assert found.adapter == WiderConfig(gate_sharpness=2.0)
    assert found.given.recorded["sharpness"] == 2.0
    with pytest.raises(InputError, match="--sharpness must be positive, not 0"):
        options(TRAIN, *GIVEN, "--sharpness", "0")


def test_a_new_setting_stands_in_configs_and_recipes(tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", "sharpness: 3\n")
    recipe = written(tmp_path / "own.yaml", "train: {sharpness: 4, rank: 2}\n")
    by_recipe = options(TRAIN, *GIVEN, "--recipe", recipe).adapter
    assert (by_recipe.gate_sharpness, by_recipe.rank) == (4.0, 2)
    by_both = options(TRAIN, *GIVEN, "--recipe", recipe, "--config", config).adapter
    assert (by_both.gate_sharpness, by_both.rank) == (3.0, 2)
    by_hand = options(TRAIN, *GIVEN, "--config", config, "--sharpness", "5").adapter
    assert by_hand.gate_sharpness == 5.0
    with pytest.raises(InputError, match="--sharpness must be positive, not -6"):
        TRAIN.prepare({"model": "m", "data": "d", "out": "o", "sharpness": -6})


def test_a_new_setting_of_the_adapter_comes_from_the_run_that_start_names(tmp_path: Path) -> None:
    start = ("--start", "run", "--data", "d", "--out", "o")
    with pytest.raises(InputError, match="--sharpness comes from the run that --start names"):
        options(TRAIN, *start, "--sharpness", "2")
    config = written(tmp_path / "config.yaml", "sharpness: 3\n")
    with pytest.raises(InputError, match=r"sharpness in .*config\.yaml comes from the run"):
        options(TRAIN, *start, "--config", config)
    recipe = written(tmp_path / "own.yaml", "train: {sharpness: 4}\n")
    assert options(TRAIN, *start, "--recipe", recipe).start == Path("run")


def test_a_new_setting_is_in_the_plan_the_run_and_the_inventory(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider: Callable[..., Any] = program(TRAIN)
    _, *arguments = train_arguments(place, "wider", "--sharpness", "2", "--steps", "1")
    assert not wider([*arguments, "--dry-run"], standalone_mode=False)
    assert not (place / "wider").exists()
    wider(arguments, standalone_mode=False)
    kept = json.loads((place / "wider" / "run.json").read_text())["config"]
    assert kept["sharpness"] == 2.0
    saved = json.loads((place / "wider" / "polyroute.json").read_text())["config"]
    assert saved["gate_sharpness"] == 2.0


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(
    place: Path, run: Path
) -> None:
    again: Callable[..., Any] = program(TRAIN)
    _, *arguments = train_arguments(place, "run", "--resume")
    again(arguments, standalone_mode=False)
    with pytest.raises(InputError, match="is older than the option sharpness"):
        again([*arguments, "--sharpness", "2"], standalone_mode=False)


def test_a_new_setting_of_adaptation_arrives_everywhere(
    place: Path, run: Path, tmp_path: Path
) -> None:
    shown = CliRunner().invoke(program(ADAPT), ["--help"], env={"COLUMNS": "200"}).output
    assert "--slot-noise" in shown
    assert "Noise of a slot's gradients." in shown
    recipe = written(tmp_path / "own.yaml", "adapt: {slot-noise: 0.5}\n")
    given = ("run", "--data", "d")
    found = options(ADAPT, *given, "--recipe", recipe)
    assert (found.settings.slot_noise, found.settings.shots) == (0.5, 32)
    config = written(tmp_path / "config.yaml", "slot-noise: 0.25\n")
    found = options(ADAPT, *given, "--recipe", recipe, "--config", config)
    assert found.settings.slot_noise == found.given.recorded["slot_noise"] == 0.25
    grid = options(ADAPT, *given, "--grid", "slot_noise=0.1,0.2").grid
    assert list(variants(found.settings, grid)) == ["slot_noise=0.1", "slot_noise=0.2"]
    program(ADAPT)(
        [str(run), "--data", str(place / "suite"), "--tasks", "first", "--seeds", "0", "--steps",
         "1", "--shots", "4", "--slot-noise", "0.5", "--out", str(tmp_path / "adapted")],
        standalone_mode=False,
    )  # fmt: skip
    kept = json.loads((tmp_path / "adapted" / "run.json").read_text())["config"]
    assert kept["slot_noise"] == 0.5


def test_a_dry_run_shows_every_setting_of_the_adapter(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*train_arguments(place, "planned"), "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["adapter"].keys() == {one.name for one in fields(MHRConfig)}


def test_the_program_has_every_command() -> None:
    known: Any = typer.main.get_command(app)
    assert set(known.commands) == {command.name for command in COMMANDS}
