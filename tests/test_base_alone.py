"""The untouched base model, scored as a run is."""

import json
from pathlib import Path
from typing import Any

import pytest

from polyroute.program.cli.app import main


def write(folder: Path) -> Path:
    folder.mkdir()
    for task in ("one", "two"):
        records = [
            {"instruction": "Say.", "input": f"{task} {i}", "target": ["yes", "no"][i % 2],
             "choices": ["yes", "no"], "split": "test"}
            for i in range(12)
        ]  # fmt: skip
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{task}.jsonl").write_text(text)
    return folder


def scores(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_base_model_scores_what_an_inventory_that_changes_nothing_scores(tmp_path: Path) -> None:
    data = write(tmp_path / "suite")
    out = tmp_path / "base.json"
    main(["evaluate", "--model", "demo", "--data", str(data), "--out", str(out)])
    found = scores(out)
    assert found["model"] == "demo"
    assert found["run"] is None
    assert [task["num_examples"] for task in found["tasks"]] == [12, 12]
    assert [task["majority"] for task in found["tasks"]] == [None, None]  # nothing to train on

    for task in ("one", "two"):
        path = data / f"{task}.jsonl"
        path.write_text(path.read_text() + path.read_text().replace('"test"', '"train"'))
    run = tmp_path / "run"
    main(["train", "--model", "demo", "--data", str(data), "--steps", "1", "--lr", "1e-12",
          "--out", str(run)])  # fmt: skip
    main(["evaluate", str(run), "--data", str(data)])
    trained = scores(run / "evaluate-test.json")
    assert [t["score"] for t in trained["tasks"]] == [t["score"] for t in found["tasks"]]


def test_some_examples_of_each_task_are_the_same_each_time(tmp_path: Path) -> None:
    data = write(tmp_path / "suite")
    found = []
    for name in ("a.json", "b.json"):
        out = tmp_path / name
        main(["evaluate", "--model", "demo", "--data", str(data), "--out", str(out),
              "--max-test", "5"])  # fmt: skip
        found.append(scores(out)["tasks"])
    assert found[0] == found[1]
    assert [task["num_examples"] for task in found[0]] == [5, 5]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "name a run, or with --model a base model"),
        (["--model", "demo"], "say with --out"),
        (["--model", "demo", "--zero-shot"], "--zero-shot is for a run"),
        (["RUN", "--model", "demo"], "--model comes from the run"),
        (["RUN", "--dtype", "bfloat16"], "--dtype comes from the run"),
    ],
)
def test_either_a_run_or_a_base_model_is_scored(
    given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *given, "--data", str(write(tmp_path / "suite"))])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
