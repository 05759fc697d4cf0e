import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from reproduce_data import TEMPLATE, write_base, write_suite, write_superni, write_t0

import polyroute.adapt
from polyroute.adapting.settings import AdaptSettings
from polyroute.data.open import open_suite
from polyroute.data.sampling import draw_few_shot
from polyroute.errors import InputError
from polyroute.program.cli.adapt import adapt
from polyroute.program.cli.app import main
from polyroute.program.cli.command import Command
from polyroute.program.cli.evaluate import evaluate
from polyroute.program.cli.train import train
from polyroute.program.options.experiments import ReproduceOptions
from polyroute.program.reproduce.preset import preset_names, read_preset
from polyroute.program.reproduce.rehearsal import BEGIN
from polyroute.program.reproduce.results import aggregate
from polyroute.program.reproduce.run import run_preset
from polyroute.study.evaluate import Questions

TINY = {
    "train.steps": 3, "train.bf16": False, "train.max-input": 32, "train.max-target": 4,
    "adapt.steps": 2, "methods.mhr.train.heads": 4,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "suite": {"shots": 4, "adapt.validation-shots": 4, "seeds": [0, 1]},
    "superni": {
        "shots": 2,
        "adapt.validation-shots": 2,
        "seeds": [0, 1],
        "least": 105,
        "reader.max_input": 32,
    },
    "t0": {"tasks": ["rte"], "seeds": [42, 0]},
}


@pytest.fixture(autouse=True)
def leave_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of tests are small, and giving memory back takes half a second after each."""
    for module in ("program.stages", "program.reproduce.rehearsal"):
        monkeypatch.setattr(f"polyroute.{module}.give_back_memory", lambda: None)


FEW = {"methods.mhr.phases": ["z"], "methods.shared.phases": ["full"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    write_base(folder / "base")
    write_suite(folder / "suite")
    write_superni(folder / "superni")
    write_t0(folder / "t0")
    return folder


def arguments(place: Path, preset: str, *extra: str, out: str = "", **settings: Any) -> list[str]:
    found = {**TINY, **SETTINGS[preset], **settings}
    pairs = [part for k, v in found.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    return [
        "reproduce", preset, "--model", str(place / "base"), "--data", str(place / preset),
        "--out", str(place / (out or f"out-{preset}")), *pairs, *extra,
    ]  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def by_way(results: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(way["method"], way["phase"]): way for way in results["results"]}


def test_the_suite_preset_from_beginning_to_end(place: Path) -> None:
    main(arguments(place, "suite", "--methods", "mhr,shared", **FEW))
    out = place / "out-suite"
    results = read(out / "results.json")
    ways = by_way(results)
    assert list(ways) == [
        ("mhr", "zero-shot"), ("mhr", "z"), ("shared", "zero-shot"), ("shared", "full"),
    ]  # fmt: skip
    assert (results["selection"], results["published_source"]) == ("separate", None)
    scores = [r["score"] for r in read(out / "mhr" / "z-4" / "results.json")]
    assert list(ways["mhr", "z"]["tasks"]["first"]["scores"].values()) == scores
    assert ways["mhr", "z"]["score"] == sum(scores) / 2
    assert ways["mhr", "z"]["mean_std_over_seeds"] == stdev(scores)
    assert ways["mhr", "z"]["std_over_tasks"] is None  # there is one task
    page = (out / "results.md").read_text()
    assert "| MHR | z |" in page
    assert "Selection: **separate**" in page
    config = read(out / "mhr" / "run.json")["config"]
    assert (config["recipe"], config["max_grad_norm"], config["steps"]) == ("paper", 0.1, 3)


def test_what_is_done_is_not_done_again(place: Path) -> None:
    again = arguments(place, "suite", "--methods", "mhr,shared", "--resume", **FEW)
    out = place / "out-suite"
    before = read(out / "results.json")
    trained = (out / "mhr" / "metrics.json").stat().st_mtime_ns
    (out / "results.json").unlink()
    (out / "mhr" / "zero-shot.json").unlink()
    (out / "mhr" / "z-4" / "results.json").unlink()
    main(again)
    assert read(out / "results.json") == before
    assert (out / "mhr" / "metrics.json").stat().st_mtime_ns == trained


def test_a_run_goes_on_with_the_same_settings_only(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments(place, "suite", "--methods", "mhr,shared", "--resume", **{"train.lr": 1}))
    assert "was started with settings=" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments(place, "suite"))
    assert "--resume continues it" in capsys.readouterr().err


def test_the_superni_preset_adapts_to_tasks_with_enough_instances(place: Path) -> None:
    settings = {"methods.mhr.phases": ["mu"], "mu-training.steps": 2}
    main(arguments(place, "superni", "--methods", "mhr", **settings))
    results = read(place / "out-superni" / "results.json")
    assert list(by_way(results)) == [
        ("mhr", "zero-shot"), ("mhr", "zero-shot, mu trained further"), ("mhr", "mu"),
    ]  # fmt: skip
    further = read(place / "out-superni" / "mhr-mu" / "run.json")["config"]
    assert (further["phase"], further["steps"], further["objective"]) == ("mu", 2, "superni")
    assert list(by_way(results)["mhr", "mu"]["tasks"]) == ["task003_copy"]
    config = read(place / "out-superni" / "mhr" / "run.json")["config"]
    assert (config["objective"], config["gate"]) == ("superni", "relaxed_bernoulli")
    assert config["reader"] == {"tokenizer": str(place / "base"), "max_input": 32}


def test_the_t0_preset_takes_the_few_shot_file_of_each_seed(place: Path) -> None:
    main(
        arguments(
            place, "t0", "--methods", "mhr", "--selection", "paper",
            **{"methods.mhr.phases": ["full"]},
        )
    )  # fmt: skip
    out = place / "out-t0"
    results = read(out / "results.json")
    way = by_way(results)["mhr", "full"]
    assert results["selection"] == "paper"
    assert list(way["tasks"]["rte"]["scores"]) == ["42", "0"]
    assert way["published"] == [69.1, 69.3]
    assert "draw_figure.ipynb" in results["published_source"]
    for seed in (42, 0):
        folder = out / "mhr" / f"full-32-{seed}"
        config = read(folder / "run.json")["config"]
        assert (config["reader"], config["seeds"]) == ({"seed": seed}, [seed])
        assert (config["eval_steps"], config["objective"]) == (200, "t-few")
        assert read(folder / "results.json")[0]["chosen_by"] == "test_score_normalised"
    page = (out / "results.md").read_text()
    assert "published: T5-XL-LM" in page
    assert "such scores are too high" in page


def planned(
    place: Path, preset: str, out: Path, **options: Any
) -> list[tuple[str, dict[str, Any]]]:
    """The stages of a preset, checked by the commands but not run."""
    stages = []

    def checked(command: Command[Any]) -> Callable[[Mapping[str, Any]], Callable[[], None]]:
        def check(given: Mapping[str, Any]) -> Callable[[], None]:
            command.prepare(given)
            stages.append((command.name, dict(given)))
            return lambda: None

        return check

    given = {"model": str(place / "base"), "data": str(place / preset), **options}
    run_preset(
        ReproduceOptions(preset=preset, out=out, **given),
        {
            BEGIN: checked(train),
            **{command.name: checked(command) for command in (train, adapt, evaluate)},
        },
    )
    return stages[len(stages) // 2 :]  # each is rehearsed before the first one runs


@pytest.mark.parametrize("preset", preset_names())
def test_every_stage_of_every_preset_is_a_command_that_exists(
    place: Path, preset: str, tmp_path: Path
) -> None:
    needed = {"t0": {"tasks": ["rte"], "seeds": [42, 0]}, "superni": {"least": 0}}.get(preset)
    stages = planned(place, preset, tmp_path / "out", settings=needed)
    content = read_preset(preset)
    assert sum(name == "train" for name, _ in stages) == len(content.methods)
    for way in (content.reference or {}).get("rows", {}):
        method, phase = way.split()
        assert phase in content.methods[method]["phases"]


def test_what_is_set_by_hand_wins(place: Path, tmp_path: Path) -> None:
    settings = {"train.rank": 2, "adapt.lr": 0.5, "shots": 7, "methods.poly.train.skills": 3}
    stages = planned(
        place, "suite", tmp_path / "out", settings=settings, quick=True,
        methods=["shared-big", "poly"],
    )  # fmt: skip
    trained = [options for name, options in stages if name == "train"]
    assert [(o["rank"], o["steps"]) for o in trained] == [(2, 200), (2, 200)]
    assert trained[1]["skills"] == 3
    adapted = [options for name, options in stages if name == "adapt"]
    assert {(o["lr"], o["shots"], o["steps"], tuple(o["seeds"])) for o in adapted} == {
        (0.5, 7, 10, (42,))
    }


def test_each_number_of_shots_is_adapted_apart_and_looked_at_every_fifty_epochs(
    place: Path, tmp_path: Path
) -> None:
    data = write_t0(tmp_path / "t0")
    shots = (data / "few_shot" / "rte" / "32_shot" / "42_seed.jsonl").read_text().splitlines()[:20]
    copies = {
        "few_shot/h-swag/20_shot/42_seed.jsonl": "\n".join(shots) + "\n",
        "raw/hellaswag/None/validation.jsonl": "\n".join(shots) + "\n",
        "templates/hellaswag/templates.yaml": TEMPLATE,
    }
    for path, text in copies.items():
        (data / path).parent.mkdir(parents=True)
        (data / path).write_text(text)
    stages = planned(
        place, "t0", tmp_path / "out", data=str(data), methods=["ia3"], selection="paper",
        settings={"tasks": ["h-swag", "rte"], "seeds": [42]},
    )  # fmt: skip
    looks = [(o["tasks"], o["shots"], o["eval_steps"]) for name, o in stages if name == "adapt"]
    assert looks == [(["h-swag"], 20, 150), (["rte"], 32, 200)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 1000}, r"too few for 1000 shots \+ 4 validation shots.*adapt of shared/full"),
        ({"adapt.split": "nope"}, "there is no split 'nope'"),
        ({"adapt.memory": "x"}, "memory must be a size such as 8GB"),
        ({"adapt.init": "nope"}, "unknown task 'nope'"),
        ({"methods.mhr.train.heads": 3}, r"num_heads=3 does not divide.*train of mhr"),
        ({"methods.mhr.train.target": "zzz"}, r"target module 'zzz' matches no layer"),
        ({"methods.mhr.train.tasks": ["nope"]}, "has no task 'nope'"),
        (
            {"mu-training": {"steps": 0}, "methods.mhr.phases": ["mu"]},
            "--steps must .*train of mhr-mu",
        ),
        ({"adapt.dry-run": True}, "give --dry-run to `polyroute reproduce` itself"),
        ({"train.json": True}, "give --json to `polyroute reproduce` itself"),
        ({"adapt.seeds": [7]}, "every stage gets its seeds from the preset"),
        ({"tasks": []}, r"tasks must be a list such as \[rte, cb\]"),
        ({"methods.mhr.phases": ["z", "z"]}, "each once"),
        ({"model": "other"}, "--model and --set model differ"),
    ],
)
def test_what_a_later_stage_would_refuse_is_found_before_the_first(
    place: Path, settings: dict[str, Any], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = arguments(
        place, "suite", "--methods", "shared,mhr", out="refused", **{**FEW, **settings}
    )
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--dry-run"])
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("extra", "settings", "message"),
    [
        (["--methods", "mrh"], {}, "the preset t0 has no method 'mrh'; did you mean 'mhr'"),
        (["--selection", "best"], {}, "has no selection 'best'; known: 'paper', 'separate'"),
        ([], {"train.stpes": 3}, "option 'stpes' of polyroute train does not exist: did you mean"),
        ([], {"sedes": [3]}, "the preset t0 has no 'sedes' to set; did you mean 'seeds'"),
        ([], {"methods.mrh.phases": []}, "has no 'methods.mrh.phases' to set"),
        ([], {"methods.mhr.phases": "z"}, "phases of the method 'mhr' must be a list of some of"),
        ([], {"adapt.lr": -1}, "--lr must be positive, not -1"),
        ([], {"seeds": "42"}, "seeds must be a list of whole numbers"),
        ([], {"tasks": ["rte", "new"]}, "shots has no number for the task 'new'"),
        ([], {"tasks": ["cb"]}, "has no task 'cb'.*the preset t0 needs a folder with a copy of"),
        ([], {"seeds": [1024]}, r"there is no .*1024_seed\.jsonl"),
        ([], {"model": "google/not-here"}, "base model 'google/not-here' cannot be loaded"),
        ([], {"data": "nowhere"}, "nowhere.*the preset t0 needs a folder with a copy of"),
        ([], {"data": None}, "the preset t0 needs --data: a folder with a copy of"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(
    place: Path, extra: Sequence[str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from polyroute.program.cli.app import app

    given = arguments(place, "t0", *extra, out="none", **settings)
    for name in ("model", "data"):  # set by --set instead
        if name in settings:
            at = given.index(f"--{name}")
            del given[at : at + 2]
    with pytest.raises(InputError, match=f"(?s){message}"):
        app(given, standalone_mode=False)
    assert not (place / "none").exists()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("score", "acuracy", "score must be score or score_normalised, not 'acuracy'"),
        ("least", "many", "least must be a whole number, 0 or more, not 'many'"),
        ("methods", 5, "methods must map names to values, not be 5"),
        ("methods.mhr", 5, "methods must map names to values"),
        ("mu-training", [1], "mu-training must map names to values"),
        ("model", 5, "model must be a name, not 5"),
        ("data", 5, "data must be a suite, not 5"),
        ("zero-shot", "no way", "zero-shot must be true or false, not 'no way'"),
        ("seeds", [-1], "seeds must be different numbers from 0"),
        ("seeds", [3, 3], "seeds must be different numbers from 0"),
        ("tasks", [5], "tasks must be a list such as"),
        ("says", 5, "says must be a list of sentences, not 5"),
        ("reference", 5, "reference must have source, columns and rows, not 5"),
        ("seeds-of", "luck", "seeds-of must be draw or reader, not 'luck'"),
    ],
)
def test_a_value_of_another_kind_is_refused_before_anything_runs(
    place: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_preset("suite", {place: value})


def test_a_preset_that_is_not_there() -> None:
    with pytest.raises(InputError, match="there is no preset 't1'; did you mean 't0'"):
        read_preset("t1")


def test_the_aggregate_is_the_median_over_seeds_then_the_mean_over_tasks() -> None:
    scores = {"a": [0.1, 0.2, 0.9], "b": [0.5, None, 0.7], "c": [None, None, None]}
    results = [
        {"task": task, "seed": seed, "score": score}
        for task, values in scores.items()
        for seed, score in zip((42, 1024, 0), values, strict=True)
    ]
    found = aggregate(results)
    assert found["score"] == pytest.approx((0.2 + 0.6) / 2)
    assert found["std_over_tasks"] == pytest.approx(stdev([0.2, 0.6]))
    assert found["mean_std_over_seeds"] == pytest.approx(
        (stdev([0.1, 0.2, 0.9]) + stdev([0.5, 0.7])) / 2
    )
    assert found["diverged"] == 4
    assert found["tasks"]["b"]["scores"] == {"42": 0.5, "0": 0.7}
    with pytest.raises(InputError, match="no result has a 'score'"):
        aggregate(results[-3:])


@pytest.mark.parametrize("choose_by", ["score", "test_score"])
def test_the_best_step_is_that_of_the_best_score(
    place: Path, choose_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    scripted = [0.2, 0.9, 0.4, 0.9, 0.0]

    def score_rows(model: Any, kind: Any, asked: Questions, *, route: str) -> Any:
        seen.append(list(asked.answers))
        return scripted[len(seen) - 1], None

    monkeypatch.setattr(polyroute.adapt, "score_rows", score_rows)
    run, out = place / "out-suite" / "mhr", place / f"by-{choose_by}"
    main(
        ["adapt", str(run), "--data", str(place / "suite"), "--shots", "4", "--phase", "z",
         "--seeds", "5", "--steps", "4", "--eval-steps", "1", "--validation-shots", "3",
         "--choose-by", choose_by, "--out", str(out)]
    )  # fmt: skip
    (result,) = read(out / "results.json")
    assert (result["best_step"], result["steps"]) == (2, 4)
    assert (result["chosen_by"], result["validation_loss"]) == (choose_by, None)
    suite = open_suite(place / "suite")
    train, test = (suite.split("first", split)["target"] for split in ("train", "test"))
    drawn = draw_few_shot(len(train), 7, 5)[4:]
    looked_at = [train[i] for i in drawn] if choose_by == "score" else list(test)
    assert seen == [looked_at] * 4 + [list(test)]


def test_choosing_by_a_score_needs_examples_to_score() -> None:
    with pytest.raises(InputError, match="'score' looks at validation examples"):
        AdaptSettings(choose_by="score")
    with pytest.raises(InputError, match="unknown choose_by 'tset_score'"):
        AdaptSettings(choose_by="tset_score")
