"""What a resumed run is asked for is compared with what it did, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import train_arguments

import polyroute.program.commands.runs
from polyroute.program.cli.app import main
from polyroute.program.commands.runs import BaseModel


class Loaded(BaseException):
    """The base model was loaded."""


def edit(folder: Path, **values: Any) -> dict[str, Any]:
    """Replace settings in the `run.json` of a run; None takes one out."""
    path = folder / "run.json"
    description = json.loads(path.read_text())
    description.pop("sha256", None)
    description["config"] |= values
    description["config"] = {k: v for k, v in description["config"].items() if v is not None}
    path.write_text(json.dumps(description))
    return dict(description["config"])


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return " ".join(capsys.readouterr().err.split())


def of_chat(place: Path, base: Path, run: str, *extra: str) -> list[str]:
    arguments = train_arguments(place, run, "--max-input", "64", *extra)
    arguments[arguments.index("--model") + 1] = str(base)
    return arguments


def test_a_run_resumes_on_the_examples_that_it_began_with(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "suite", tmp_path / "run"
    data.mkdir()
    row = {"instruction": "", "input": "a", "target": "b", "choices": None, "split": "train"}
    file = data / "one.jsonl"
    file.write_text((json.dumps(row) + "\n") * 4)
    given = train_arguments(place, str(out))
    given[given.index("--data") + 1] = str(data)
    main(given)
    (out / "metrics.json").unlink()
    before = (out / "polyroute.json").read_bytes()
    file.write_text((json.dumps({**row, "target": "c"}) + "\n") * 4)
    with pytest.raises(SystemExit):
        main([*given, "--resume"])
    assert "was started on other training examples" in capsys.readouterr().err
    file.write_text((json.dumps(row) + "\n") * 4)
    main([*given, "--resume"])
    assert (out / "polyroute.json").read_bytes() == before

    description = json.loads((out / "run.json").read_text())
    del description["config"]["examples_sha256"]  # as older versions wrote it
    del description["sha256"]
    (out / "run.json").write_text(json.dumps(description))
    main([*given, "--resume"])


def test_a_run_from_before_chats_goes_on_with_plain_prompts(
    place: Path,
    chat_base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main(of_chat(place, chat_base, "older", "--prompt", "plain"))
    edit(place / "older", prompt=None, system=None, examples_sha256=None)
    given: list[BaseModel] = []
    load = polyroute.program.commands.train.load

    def noted(base: BaseModel, **options: Any) -> Any:
        given.append(base)
        return load(base, **options)

    monkeypatch.setattr("polyroute.program.commands.train.load", noted)
    main(of_chat(place, chat_base, "older", "--resume"))
    main(of_chat(place, chat_base, "older", "--resume", "--prompt", "plain"))
    assert [base.reading.prompt for base in given] == ["plain", "plain"]
    for prompt in ("chat", "auto"):
        again = of_chat(place, chat_base, "older", "--resume", "--prompt", prompt)
        message = refused(again, capsys)
        assert "is older than the option prompt, whose value was always 'plain'" in message
    edit(place / "older", prompt="auto")  # a run of today that says nothing of prompts
    main(of_chat(place, chat_base, "older", "--resume", "--steps", "12"))
    assert given[-1].reading.prompt == "auto"


def test_another_type_is_refused_before_the_base_model_is_loaded(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise Loaded

    adapt = ["adapt", str(run), "--data", str(place / "suite"), "--tasks", "first", "--seeds", "0",
             "--steps", "1", "--shots", "4", "--out", str(place / "adapted")]  # fmt: skip
    main(adapt)
    edit(run, dtype="bfloat16")  # what --dtype auto came to
    monkeypatch.setattr(polyroute.program.commands.runs, "load_base", never)
    message = refused(train_arguments(place, "run", "--resume"), capsys)
    assert "was started with dtype='bfloat16', not 'float32'; resume it with the same" in message
    message = refused([*adapt, "--resume", "--lr", "0.5"], capsys)
    assert "was started with lr=0.001, not 0.5" in message
    with pytest.raises(Loaded):
        main(train_arguments(place, "run", "--resume", "--dtype", "bfloat16"))
    edit(run, dtype="float32")  # what auto comes to elsewhere, and what is the default
    with pytest.raises(Loaded):
        main(train_arguments(place, "run", "--resume"))
