"""Runs and their folders: nothing is lost, nothing is mixed, and bad input ends in one sentence."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny_runs import write_base, write_suite, write_task

from polyroute.adapting.settings import AdaptSettings
from polyroute.errors import InputError
from polyroute.host.files import write_json
from polyroute.program.cli.app import main
from polyroute.saved.runs import held, open_run, read_run, record


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_suite(folder / "suite")
    write_base(folder / "base")
    main(train(folder, "trained"))
    return folder


def train(place: Path, run: str, *extra: str) -> list[str]:
    return [
        "train", "--model", str(place / "base"), "--data", str(place / "suite"), "--skills", "2",
        "--heads", "2", "--rank", "1", "--steps", "2", "--batch-size", "2", "--save-steps", "1",
        "--max-input", "16", "--max-target", "8", "--out", str(place / run), *extra,
    ]  # fmt: skip


def adapt(place: Path, run: Path, out: Path, *extra: str) -> list[str]:
    return [
        "adapt", str(run), "--data", str(place / "suite"), "--tasks", "pick", "--shots", "4",
        "--steps", "1", "--seeds", "0", "--out", str(out), *extra,
    ]  # fmt: skip


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A trained run of its own for each test."""
    return Path(shutil.copytree(place / "trained", tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ends in, with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


# ------------------------------------------------------------- what must not be deleted


@pytest.mark.parametrize("out", ["run", "run/../run", "."])
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_adapting_never_touches_its_own_inventory(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], out: str, flag: str
) -> None:
    shutil.copy(run / "run.json", run.parent / "run.json")
    before = content(run)
    sentence = refused(adapt(place, run, run.parent / out, flag), capsys)
    assert "is or contains" in sentence
    assert content(run) == before


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_run_of_another_command_is_left_alone(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    other = Path(shutil.copytree(run, run.parent / "other"))
    before = content(other)
    assert "`polyroute train`" in refused(adapt(place, run, other, flag), capsys)
    assert "`polyroute train`" in refused(["demo", "--out", str(other), "--overwrite"], capsys)
    assert content(other) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--report-to", "nothing"], "nothing is not supported"),
        (["--warmup", "nan"], "--warmup"),
        (["--warmup", "inf"], "--warmup"),
        (["--warmup", "-0.1"], "--warmup"),
        (["--warmup", "1.5"], "--warmup"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**32)], "--seed"),
        (["--cap", "0"], "--cap"),
        (["--lr", "nan"], "--lr"),
        (["--route-lr", "inf"], "--route-lr"),
        (["--weight-decay", "nan"], "--weight-decay"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--temperature", "nan"], "--temperature"),
        (["--phase", "z"], "'z'"),
        (["--rank", str(10**12)], "--rank"),
        (["--rank", str(10**25)], "--rank"),
        (["--batch-size", str(10**25)], "--batch-size"),
        (["--cap", str(10**25)], "--cap"),
        (["--tasks", "coppy"], "did you mean"),
    ],
)
def test_overwriting_destroys_nothing_before_all_is_checked(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    before = content(run)
    assert sentence in refused(
        [*train(place, "x"), "--out", str(run), "--overwrite", *arguments], capsys
    )
    assert content(run) == before


def test_bfloat16_trains_without_a_gpu(place: Path) -> None:
    main(train(place, "bf16", "--bf16"))
    assert (place / "bf16" / "polyroute.json").is_file()


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "x", "train", resume=False, overwrite=False)
    record(folder, "train", {})
    with pytest.raises(InputError, match="holds a run already"):
        record(folder, "train", {})
    with held(folder):
        for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(InputError, match="another process"):
                open_run(folder, "train", **flags)
    open_run(folder, "train", resume=True, overwrite=False)


# ------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["lr", "route_lr", "weight_decay", "warmup", "max_grad_norm"])
def test_settings_refuse_what_is_no_number(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        AdaptSettings(**{name: value})


def test_json_is_valid_or_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="NaN"):
        write_json(tmp_path / "x.json", {"a": math.nan})
    assert not list(tmp_path.iterdir())


def test_diverging_is_no_success(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sentence = refused(train(place, "diverged", "--lr", "1e37", "--steps", "4"), capsys)
    assert "training diverged" in sentence
    assert not (place / "diverged" / "metrics.json").exists()
    out = tmp_path / "adapted"
    sentence = refused(adapt(place, run, out, "--lr", "1e37", "--steps", "4"), capsys)
    assert "training diverged" in sentence
    assert not (out / "results.json").exists()


# ------------------------------------------------------------- resuming


def test_resuming_a_finished_run_does_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(place / "trained")
    main(train(place, "trained", "--resume"))
    assert "finished" in capsys.readouterr().out
    assert content(place / "trained") == before


def test_a_run_interrupted_after_its_last_step_is_completed(place: Path, run: Path) -> None:
    whole = content(run)
    for name in (
        "metrics.json",
        "polyroute.json",
        "inventory.safetensors",
        "routes-00000-of-00001.safetensors",
    ):
        (run / name).unlink()
    main([*train(place, "x"), "--out", str(run), "--resume"])
    assert json.loads((run / "metrics.json").read_text())["steps"] == 2
    after = content(run)
    for name in ("polyroute.json", "inventory.safetensors", "routes-00000-of-00001.safetensors"):
        assert after[name] == whole[name]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth",
                                  "trainer_state.json", "inventory.safetensors"])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_or_named(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (run / "metrics.json").unlink()
    (run / "checkpoint-2" / name).write_bytes(b"{")
    resume = [*train(place, "x"), "--out", str(run), "--resume"]
    (run / "checkpoint-1" / name).rename(run / "away")
    if name != "trainer_state.json":
        (run / "checkpoint-1" / "trainer_state.json").rename(run / "state")
    assert f"checkpoint-2/{name}" in refused(resume, capsys)
    (run / "away").rename(run / "checkpoint-1" / name)
    if name != "trainer_state.json":
        (run / "state").rename(run / "checkpoint-1" / "trainer_state.json")
    main(resume)
    assert "resuming from checkpoint-1" in " ".join(capsys.readouterr().out.split())
    assert (run / "metrics.json").is_file()


def test_a_missing_optimizer_is_named(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "checkpoint-1")
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    sentence = refused([*train(place, "x"), "--out", str(run), "--resume"], capsys)
    assert "optimizer.pt is missing" in sentence


def test_resumed_adaptations_are_all_of_one_inventory(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "adapted"
    main(adapt(place, run, out))
    main(adapt(place, run, out, "--resume"))
    main([*train(place, "x"), "--out", str(run), "--overwrite", "--seed", "5"])
    assert "another inventory" in refused(adapt(place, run, out, "--resume"), capsys)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "5", '{"config": []}', "{"])
def test_damaged_descriptions_and_results_are_named(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    out = tmp_path / "adapted"
    main(adapt(place, run, out))
    if text != "[]":
        (out / "results.json").write_text(text)
        assert "results.json" in refused(adapt(place, run, out, "--resume"), capsys)
    (out / "run.json").write_text(text)
    assert "run.json" in refused(adapt(place, run, out, "--resume"), capsys)
    (run / "run.json").write_text(text)
    assert "run.json" in refused(["evaluate", str(run), "--data", str(place / "suite")], capsys)


def test_a_run_holds_in_any_directory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    arguments = [*train(place, "x"), "--out", str(tmp_path / "r"), "--model", "base"]
    main([*arguments, "--data", "suite"])
    (tmp_path / "r" / "metrics.json").unlink()
    main([*arguments, "--data", "suite/", "--resume"])
    assert read_run(tmp_path / "r")["config"]["data"] == str(place / "suite")
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "r", "--data", str(place / "suite"), "--tasks", "copy"])


def test_hub_ids_and_names_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for model in ("demo", "package:x", "google/t5"):
        record(tmp_path, "train", {"model": model})
        assert read_run(tmp_path)["config"]["model"] == model
        (tmp_path / "run.json").unlink()


# ------------------------------------------------------------- places and names


def test_scores_replace_only_scores(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["evaluate", str(run), "--data", str(place / "suite"), "--tasks", "copy", "--out"]
    before = content(run)
    assert "is a folder" in refused([*command, str(tmp_path)], capsys)
    assert "no result" in refused([*command, str(run / "polyroute.json")], capsys)
    assert "is a file" in refused([*command, str(run / "run.json" / "x.json")], capsys)
    assert content(run) == before
    for _ in range(2):
        main([*command, str(tmp_path / "new" / "scores.json")])


def test_an_adapter_goes_into_no_other_folder(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = content(run)
    sentence = refused(["export", str(run), "--task", "copy", "--out", str(run)], capsys)
    assert "holds no adapter" in sentence
    assert content(run) == before
    for _ in range(2):
        main(["export", str(run), "--task", "copy", "--out", str(tmp_path / "lora")])


@pytest.mark.parametrize("command", ["evaluate", "adapt", "export", "inspect"])
def test_an_unfinished_run_says_so(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (run / "polyroute.json").unlink()
    data = ["--data", str(place / "suite")]
    options = {"export": ["--task", "copy", "--out", str(run / "x")], "inspect": []}
    sentence = refused([command, str(run), *options.get(command, data)], capsys)
    assert "is unfinished; continue it with --resume" in sentence


def test_no_task_to_choose(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, role in (("all", "train"), ("none", "held-out")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "other.jsonl").write_bytes((place / "suite" / "copy.jsonl").read_bytes())
        about = {"category": "", "choices": False, "metric": "exact_match", "role": role}
        (folder / "roles.json").write_text(json.dumps({"other": about}))
    data = ["--data", str(tmp_path / "all")]
    assert "has no held-out task" in refused(["adapt", str(run), *data], capsys)
    assert "has no held-out task" in refused(["evaluate", str(run), "--zero-shot", *data], capsys)
    assert "none of the tasks of" in refused(["evaluate", str(run), *data], capsys)
    arguments = [*train(place, "held-out"), "--data", str(tmp_path / "none")]
    assert "is held out" in refused(arguments, capsys)


def test_task_names_are_not_markup(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    records: list[dict[str, object]] = [
        {"instruction": "Do.", "input": w, "target": w, "choices": None}
        for w in [a + b for a in "abcdefgh" for b in "ijklmnop"]
    ]
    (tmp_path / "s").mkdir()
    write_task(tmp_path / "s" / "[red]x.jsonl", records)
    arguments = [*train(place, "x"), "--data", str(tmp_path / "s"), "--out", str(tmp_path / "[b]r")]
    main(arguments)
    main(["evaluate", str(tmp_path / "[b]r"), "--data", str(tmp_path / "s")])
    printed = capsys.readouterr().out
    assert "[red]x" in printed
    assert "[b]r" in printed


@pytest.mark.parametrize("phase", ["mu-uncollapsed", "random"])
def test_a_first_route_that_would_be_ignored_is_refused(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, phase: str
) -> None:
    arguments = adapt(place, run, tmp_path / "x", "--init", "copy", "--phase", phase)
    assert "would be ignored" in refused(arguments, capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("line", ["steps: true", "lr: no", "out: yes", "init: {a: 1}"])
def test_a_config_gives_no_booleans_for_numbers(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(line + "\n")
    assert "cannot be" in refused(train(place, "boolean", "--config", str(config)), capsys)
    config.write_text("bf16: false\nbatch-size: 2\n")
    main(train(place, f"flag-{line[:2]}", "--config", str(config)))


def test_the_base_model_is_left_as_it_was_when_an_adaptation_fails(
    place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyroute.layer.routed_layer import RoutedLayer
    from polyroute.program.commands import adapt as adapting
    from polyroute.program.commands import runs

    bases = []
    original = runs.load_base

    def load(*args: str, **kwargs: str) -> object:
        bases.append(original(*args, **kwargs))
        return bases[-1]

    def fail(*args: object, **kwargs: object) -> None:
        raise InputError("stop")

    monkeypatch.setattr(runs, "load_base", load)
    monkeypatch.setattr(adapting, "adapt_suite", fail)
    with pytest.raises(SystemExit):
        main(adapt(place, run, tmp_path / "x"))
    assert not any(isinstance(m, RoutedLayer) for m in bases[0][0].modules())
