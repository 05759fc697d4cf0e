from pathlib import Path
from typing import Any

import pytest
import typer

from polyroute.adapting.settings import AdaptSettings
from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.kinds.objectives import OBJECTIVES, objective_of
from polyroute.program.cli.app import app
from polyroute.program.recipes import SECTIONS, read_recipe, recipe_names
from polyroute.program.texts import reader

GIVEN = {
    "train": ["--model", "m", "--data", "d", "--out", "o"],
    "adapt": ["run", "--data", "d"],
}


def params(command: str, *arguments: str) -> dict[str, Any]:
    """The options that a command line comes to."""
    group: Any = typer.main.get_command(app)
    context = group.commands[command].make_context(command, [*GIVEN[command], *arguments])
    values: dict[str, Any] = context.params
    return values


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_used_by_both_commands(name: str) -> None:
    train, adapt = (params(section, "--recipe", name) for section in SECTIONS)
    config = MHRConfig(
        method=train["method"], num_skills=train["skills"], num_heads=train["heads"],
        rank=train["rank"], gate=train["gate"],
    )  # fmt: skip
    assert (config.rank, config.gate) == (train["rank"], train["gate"])
    for command in (train, adapt):
        assert objective_of(command["objective"]) is OBJECTIVES[command["objective"]]
    names = AdaptSettings.__dataclass_fields__
    given = {key: value for key, value in adapt.items() if key in names}
    settings = AdaptSettings(**given)
    assert {key: getattr(settings, key) for key in given} == given


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_recipe_says_is_of_options_it_gives(name: str) -> None:
    import polyroute

    folder = Path(polyroute.__file__).parent / "program" / "recipes"
    lines = (folder / f"{name}.yaml").read_text().splitlines()
    says = [line.partition(":")[0].strip() for line in lines[lines.index("says:") + 1 :]]
    recipe = read_recipe(name)
    open_ones = {"train.heads", "adapt.shots"}  # of which a recipe may say why they are not there
    for place in says[1 : says.index("train")]:
        section, _, option = place.partition(".")
        assert option in recipe[section] or place in open_ones, place


def test_the_t0_recipe_is_that_of_the_published_configs() -> None:
    train, adapt = params("train", "--recipe", "paper-t0"), params("adapt", "--recipe", "paper-t0")
    assert (train["skills"], train["heads"], train["rank"], train["alpha"]) == (8, 64, 1, 1.0)
    assert (train["optimizer"], train["scale_parameter"]) == ("adafactor", False)
    assert (train["lr"], train["route_lr"], train["max_grad_norm"]) == (1e-3, 0.1, 1.0)
    assert (train["steps"], round(train["warmup"] * train["steps"])) == (100_000, 6_000)
    assert (train["max_input"], train["max_target"]) == (256, 256)
    assert train["target"] == "q,k,v,o,wi_0,wi_1,wo"
    assert (train["gate"], train["bf16"]) == ("sigmoid", True)
    assert (adapt["optimizer"], adapt["scale_parameter"]) == ("adafactor", True)
    assert (adapt["lr"], adapt["route_lr"], adapt["weight_decay"]) == (3e-3, 0.1, 0.0)
    assert (adapt["steps"], round(adapt["warmup"] * adapt["steps"])) == (1000, 60)
    assert (adapt["batch_size"], adapt["objective"], adapt["seeds"]) == (8, "t-few", "42,1024,0")


def test_the_superni_recipe_is_that_of_the_published_configs() -> None:
    train = params("train", "--recipe", "paper-superni")
    adapt = params("adapt", "--recipe", "paper-superni")
    assert (train["skills"], train["rank"], train["target"]) == (8, 16, "q,k,v,o")
    assert train["gate"] == "relaxed_bernoulli"
    assert (train["steps"], round(train["warmup"] * train["steps"])) == (25_000, 1_500)
    assert (train["max_input"], train["max_target"], train["batch_size"]) == (1024, 128, 8)
    for each in (train, adapt):
        assert (each["optimizer"], each["lr"], each["route_lr"]) == ("adamw", 1e-3, 0.1)
        assert (each["weight_decay"], each["route_weight_decay"]) == (0.01, 0.01)
        assert (each["max_grad_norm"], each["objective"]) == (0.1, "superni")
    assert (adapt["shots"], adapt["validation_shots"], adapt["seeds"]) == (32, 32, "13,42,58")


def test_the_paper_recipe_leaves_sizes_and_budgets_open() -> None:
    plain, train = params("train"), params("train", "--recipe", "paper")
    for name in ("method", "skills", "heads", "rank", "steps", "batch_size", "target"):
        assert train[name] == plain[name]
    assert (train["max_grad_norm"], train["route_weight_decay"], train["gate"]) == (
        0.1, 0.01, "sigmoid",
    )  # fmt: skip
    assert (train["max_input"], train["max_target"]) == (256, 64)
    assert params("adapt", "--recipe", "paper")["steps"] == params("adapt")["steps"]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_command_line_wins_over_the_config_and_that_over_the_recipe(
    tmp_path: Path, swapped: bool
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("rank: 3\nsteps: 5\nheads:\n")
    files = [["--recipe", "paper-t0"], ["--config", str(config)]]
    given = [part for pair in (files[::-1] if swapped else files) for part in pair]
    found = params("train", *given, "--steps", "7")
    assert (found["rank"], found["steps"], found["skills"]) == (3, 7, 8)
    assert found["heads"] is None


def test_a_config_may_name_the_recipe(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("recipe: paper-t0\nrank: 3\n")
    found = params("train", "--config", str(config))
    assert (found["rank"], found["heads"], found["recipe"]) == (3, 64, "paper-t0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {rnak: 2}", r"train key 'rnak' of the recipe .* does not exist: did you mean 'ra"),
        ("trian: {rank: 2}", "has a section 'trian'; did you mean 'train'"),
        ("train: [rank]", "the section 'train' of the recipe .* must map options"),
        ("train: {rank: }", "'rank' of the recipe .* cannot be None"),
        ("train: {rank: true}", "'rank' of the recipe .* cannot be True"),
        ("- rank", "must hold `option: value` lines"),
        ("train: {rank", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_fault(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        params("train", "--recipe", str(path))


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(InputError, match="there is no recipe 'papr'; did you mean 'paper'"):
        params("train", "--recipe", "papr")
    with pytest.raises(InputError, match=r"recipe none\.yaml cannot be read"):
        params("adapt", "--recipe", "none.yaml")


def test_options_of_the_reader_reach_the_suite_by_name() -> None:
    assert reader(["seed=1024", "all-templates=true"], "--reader") == {
        "seed": 1024,
        "all_templates": True,
    }
    assert reader([], "--reader") is None
    with pytest.raises(InputError, match="--reader 'seed' must be an option and its value"):
        reader(["seed"], "--reader")
