"""`polyroute demo-lm`: the commands that it prints are the ones that it runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from polyroute.exchange.lora import from_lora
from polyroute.loading import load_base
from polyroute.program.cli.app import main
from polyroute.program.commands import demo_lm

ROOT = Path(__file__).parents[1]
CONTENDERS = ["base", "shared zero-shot", "zero-shot", "fresh", "shared", "mu", "z"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a quick demo on the byte-level model left, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_lm, "MODEL", "demo")
        patch.setattr(demo_lm, "TRAIN", {**demo_lm.TRAIN, "steps": 20})
        patch.setattr(demo_lm, "ADAPT", {**demo_lm.ADAPT, "max_test": 10})
        printed: list[str] = []
        patch.setattr(demo_lm, "say", printed.append)
        with pytest.warns(UserWarning, match="too long"):
            main(["demo-lm", "--quick", "--out", str(folder), "--quiet"])
    return folder, "\n".join(printed)


def test_every_way_is_scored_on_the_same_tasks(out: tuple[Path, str]) -> None:
    content = json.loads((out[0] / "results.json").read_text())
    assert [contender["name"] for contender in content["contenders"]] == CONTENDERS
    tasks = [[task["task"] for task in contender["tasks"]] for contender in content["contenders"]]
    assert all(own == tasks[0] for own in tasks)
    assert len(tasks[0]) == 2
    for contender in content["contenders"]:
        mean = sum(task["score"] for task in contender["tasks"]) / 2
        assert contender["score"] == pytest.approx(mean)
        assert 0 <= contender["low"] <= mean <= contender["high"]
    parameters = {
        contender["name"]: contender["trained_parameters"] for contender in content["contenders"]
    }
    assert parameters["base"] == parameters["zero-shot"] == 0
    assert 0 < parameters["z"] < parameters["mu"] == parameters["fresh"] == parameters["shared"]


def test_it_writes_a_page_a_report_and_a_lora(out: tuple[Path, str]) -> None:
    folder = out[0]
    page = (folder / "results.md").read_text()
    content = json.loads((folder / "results.json").read_text())
    for contender in content["contenders"]:
        assert f"| {contender['title']} | {contender['score']:.3f} |" in page
    for answer in content["answers"]:
        assert f"**{answer['task']}** (right: {answer['target']})" in page
    assert "<html" in (folder / "report.html").read_text()
    base, _ = load_base("demo")
    task = content["answers"][0]["task"]
    assert from_lora(base, folder / "mhr" / "mu" / task / "seed-42").tasks == ("seed-42",)


def test_the_printed_commands_are_those_that_the_runs_recorded(out: tuple[Path, str]) -> None:
    _, printed = out
    lines = [shlex.split(line[2:]) for line in printed.splitlines() if line.startswith("$ ")]
    assert [line[1] for line in lines] == ["train"] * 2 + ["evaluate"] * 3 + ["adapt"] * 4 + [
        "report"
    ]
    for line in lines[:2]:
        config = json.loads((Path(line[-1]) / "run.json").read_text())["config"]
        given = dict(zip(line[2:-2:2], line[3:-2:2], strict=True))
        for flag, value in given.items():
            if flag != "--dtype":
                assert str(config[flag[2:].replace("-", "_")]) == re.sub(r"\.0$", "", value), flag


def test_a_finished_demo_resumes_without_work(
    out: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = out[0]
    monkeypatch.setattr(demo_lm, "MODEL", "demo")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/**/*.safetensors")}
    main(["demo-lm", "--quick", "--out", str(folder), "--resume"])
    assert "polyroute train" not in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/**/*.safetensors")}


def test_a_report_of_the_demo_is_one_of_its_trainings(
    out: tuple[Path, str], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    main(["report", str(out[0]), "--out", str(page)])
    assert "shared" in page.read_text()
    assert "mhr" in page.read_text()


def test_a_missing_model_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_lm, "MODEL", "package:not_there")
    with pytest.raises(SystemExit):
        main(["demo-lm", "--out", str(tmp_path / "out")])
    assert "not_there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_readme_shows_the_committed_results() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "demo_lm.json").read_text())
    assert demo_lm.table_of_contenders(content) in (ROOT / "README.md").read_text()
