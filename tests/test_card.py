"""The model card that is written from a run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serving
from huggingface_hub import ModelCard, constants
from models import routed, stack
from tiny_runs import TRAIN_TASKS
from transformers import T5ForConditionalGeneration

import polyroute
from polyroute import InputError
from polyroute.host.files import read_json, write_json
from polyroute.program.cli.app import main
from polyroute.saved.card import write_card

NAME = "user/inventory"


def section(card: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    assert found, f"no section {title!r} in {card}"
    return found[1]


@pytest.fixture(scope="module")
def finished(run: Path) -> Path:
    """A run with scores and adaptations, whose data say where they are from."""
    suite = run.parent / "suite"
    for name, licence in (("copy", "MIT"), ("upper", "MIT"), ("back", "CC-BY-4.0")):
        lines = (suite / f"{name}.jsonl").read_text().splitlines()
        first = {**json.loads(lines[0]), "source": "somewhere", "licence": licence}
        (suite / f"{name}.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    tasks = [
        {"task": "first", "metric": "exact_match", "score": 0.25, "majority": 0.5, "chance": None,
         "num_examples": 12},
        {"task": "pick", "metric": "accuracy", "score": 0.75, "majority": 0.5, "chance": 0.5,
         "num_examples": 12},
    ]  # fmt: skip
    average = {"score": 0.5}
    content = {"run": "r", "data": str(suite), "split": "test", "zero_shot": True}
    write_json(
        run / "evaluate-zero-shot-test.json",
        {**content, "macro_average": average, "tasks": tasks},
    )
    (run / "adapt-z-8").mkdir()
    write_json(run / "adapt-z-8" / "run.json", {"command": "adapt", "config": {"data": str(suite)}})
    common = {"label": "", "phase": "z", "shots": 8, "split": "test", "chosen_by": "loss"}
    scores = {"pick": (0.5, 0.7), "first": (0.2, 0.4)}
    metric = {"pick": "accuracy", "first": "accuracy"}
    results = [
        {**common, "task": task, "seed": seed, "metric": metric[task], "score": score}
        for task, values in scores.items()
        for seed, score in enumerate(values)
    ]
    diverged = {**common, "task": "pick", "seed": 2, "metric": "accuracy", "score": None}
    write_json(run / "adapt-z-8" / "results.json", [*results, diverged])
    return run


@pytest.fixture(scope="module")
def card(finished: Path) -> str:
    return write_card(finished, name=NAME, license="apache-2.0")


def test_the_header_says_what_is_known_and_no_more(card: str) -> None:
    data = ModelCard(card).data.to_dict()
    data.pop("model-index")
    assert data == {
        "library_name": "polyroute",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["polyroute", "multi-task", "mhr", "lora"],
    }


def test_the_header_has_the_means_of_what_was_measured(card: str) -> None:
    found = {
        result.metric_name: (result.metric_value, result.dataset_name, result.dataset_split)
        for result in ModelCard(card).data.eval_results
    }
    zero, adapted = (
        "zero-shot, by the average of the skills",
        "adapted in phase z, 8 examples a task",
    )
    assert found == {
        f"exact_match, mean over 1 tasks, {zero}": (0.25, "suite", "test"),
        f"accuracy, mean over 1 tasks, {zero}": (0.75, "suite", "test"),
        f"accuracy, mean over 2 tasks, {adapted}": (0.45, "suite", "test"),
    }


def test_results_come_with_their_standard_errors(card: str) -> None:
    text = section(card, "Results: adapted in phase z, 8 examples a task")
    assert "Measured on split `test` of suite." in text
    assert "| accuracy | 0.450 | 0.150 | 2 |" in text  # 0.6 and 0.3
    assert "| `pick` | accuracy | 0.600 | 0.100 | 2 |" in text  # the diverged one is no score
    zero = section(card, "Results: zero-shot, by the average of the skills")
    assert "| `first` | exact_match | 0.250 | 0.500 |  | 12 |" in zero


def test_tasks_have_the_source_and_licence_of_their_data(card: str) -> None:
    assert "| `copy` | somewhere | MIT |" in section(card, "Tasks")
    assert section(card, "Licences of the training data").endswith(
        "| MIT | 2 |\n| CC-BY-4.0 | 1 |\n\n"
    )


def test_settings_of_the_run_are_told_without_paths_of_this_machine(
    card: str, finished: Path
) -> None:
    text = section(card, "Training")
    assert "| optimizer steps | 12 |" in text
    assert "| seed | 0 |" in text
    assert "| data | suite |" in text
    assert str(finished.parent) not in card


def test_the_code_of_the_card_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_json(finished / "run.json")
    base = config["config"]["model"]
    copy = tmp_path / NAME
    copy.mkdir(parents=True)
    for path in finished.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    config["config"]["model"] = "user/base"
    del config["sha256"]
    write_json(copy / "run.json", config)
    text = write_card(copy, name=NAME)
    assert ModelCard(text).data.base_model == "user/base"
    (tmp_path / "user" / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    code = section(text, "Use").partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "card", "exec"), names)
    assert isinstance(names["base"], T5ForConditionalGeneration)
    assert names["ids"].shape[0] == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["demo", "smollm2", "package:some", "user/repo:file.gguf"])
def test_a_base_model_that_polyroute_alone_finds_is_loaded_by_its_name(
    name: str, tmp_path: Path
) -> None:
    routed(stack()).save_pretrained(tmp_path)
    config = {"model": name, "dtype": "float32"}
    write_json(tmp_path / "run.json", {"command": "train", "config": config})
    assert f'load_base("{name}", dtype="float32")' in section(write_card(tmp_path), "Use")
    assert ModelCard(write_card(tmp_path)).data.base_model is None


def test_an_inventory_alone_has_a_card_of_what_it_is(tmp_path: Path) -> None:
    routed(stack(), num_heads=2).save_pretrained(tmp_path / "mine")
    text = write_card(tmp_path / "mine")
    assert "# mine" in text
    assert "4 LoRA skills of rank 4 on 3 layers of Stack, mixed in 2 heads" in text
    assert "| `amber` |" in section(text, "Tasks")
    assert "No results were recorded" in section(text, "Limits")
    assert "## Training" not in text
    assert ModelCard(text).data.base_model is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"method": "shared"}, "1 LoRA skill of rank 4 on 3 layers of Stack, shared by 4 tasks"),
        ({"method": "private"}, "4 LoRA skills of rank 4 on 3 layers of Stack, one for each task"),
        ({"method": "poly", "adapter": "ia3"}, "4 (IA)^3 skills on 3 layers of Stack, mixed whole"),
    ],
)
def test_every_method_is_told_as_what_it_is(
    config: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    routed(stack(), **config).save_pretrained(tmp_path)
    assert sentence in write_card(tmp_path)


def test_long_tables_are_folded_and_very_long_ones_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed(stack(), tuple(f"user-{i}" for i in range(60))).save_pretrained(tmp_path)
    text = section(write_card(tmp_path), "Tasks")
    assert text.count("<details>") == 1
    assert "| `user-59` |" in text
    monkeypatch.setattr(polyroute.saved.card, "LISTED", 50)
    text = section(write_card(tmp_path), "Tasks")
    assert "and 10 more" in text
    assert "| `user-59` |" not in text


def test_names_and_data_say_nothing_in_markdown_or_html(tmp_path: Path) -> None:
    names = ("a`b<i>", "# two", "x|y", "<script>")
    routed(stack(), names).save_pretrained(tmp_path / "run")
    record = {"source": "<img src=x>\n# no", "licence": "[a](b) `"}
    (tmp_path / "<script>.jsonl").write_text(json.dumps(record))
    config = {"data": str(tmp_path)}
    write_json(tmp_path / "run" / "run.json", {"command": "train", "config": config})
    tasks = section(write_card(tmp_path / "run"), "Tasks")
    assert "| `` a`b<i> `` |" in tasks
    assert "| `# two` |" in tasks
    assert r"| `x\|y` |" in tasks
    assert r"| `<script>` | \<img src=x\> # no | \[a\](b) \` |" in tasks


def test_data_sets_of_the_hub_are_named(tmp_path: Path) -> None:
    routed(stack()).save_pretrained(tmp_path / "run")
    (tmp_path / "suite.yaml").write_text(
        "tasks: {a: {path: user/data}, b: {path: user/data}, c: {path: csv}, d: {path: /x/y}}"
    )
    for data, expected in (
        ("bigscience/P3", ["bigscience/P3"]),
        (str(tmp_path / "suite.yaml"), ["user/data"]),
        (str(tmp_path / "gone.yaml"), None),
        (str(tmp_path), None),
    ):
        write_json(tmp_path / "run" / "run.json", {"command": "train", "config": {"data": data}})
        assert ModelCard(write_card(tmp_path / "run")).data.datasets == expected


def test_a_card_that_somebody_wrote_stays_and_our_own_is_written_anew(tmp_path: Path) -> None:
    routed(stack()).save_pretrained(tmp_path)
    first = write_card(tmp_path, name="user/one")
    (tmp_path / "README.md").write_text(first)
    assert "# two" in write_card(tmp_path, name="user/two")
    (tmp_path / "README.md").write_text("# Mine\n")
    assert write_card(tmp_path, name="user/two") == "# Mine\n"
    with pytest.raises(InputError, match=r"README\.md is the model card: write the licence there"):
        write_card(tmp_path, license="mit")


def test_damaged_results_are_named(tmp_path: Path) -> None:
    routed(stack()).save_pretrained(tmp_path)
    write_json(tmp_path / "evaluate-test.json", {"tasks": []})
    with pytest.raises(InputError, match=r"evaluate-test\.json is damaged: delete it to leave"):
        write_card(tmp_path)


# ---------------------------------------------------------------- the commands


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch) as found:
        yield found


def test_a_run_is_pushed_and_used_from_the_hub(
    hub: Hub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(finished), NAME, "--private", "--license", "mit", "--message", "Ours"])
    assert f"{hub.address}/{NAME}/commit/" in capsys.readouterr().out.replace("\n", "")
    assert hub.repositories[NAME].private
    assert hub.messages == ["Ours"]
    assert hub.tokens[-1] == "Bearer hf_secret"
    files = hub.files(NAME)
    assert set(files) == {
        ".gitattributes", "README.md", "evaluate-zero-shot-test.json", "inventory.safetensors",
        "metrics.json", "polyroute.json", "routes-00000-of-00001.safetensors", "run.json",
    }  # fmt: skip
    assert str(finished.parent).encode() not in b"".join(files.values())
    sent = json.loads(files["run.json"])
    assert "argv" not in sent
    assert sent["config"]["tasks"] == sorted(TRAIN_TASKS)
    main(["inspect", NAME])
    assert "back" in capsys.readouterr().out
    main(["inspect", f"{NAME}@main"])


def test_a_run_on_the_hub_is_evaluated_and_exported(
    hub: Hub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(finished), NAME])
    sent = json.loads(hub.files(NAME)["run.json"])
    assert sent["config"]["model"] == "base"  # the base model of this run is a folder
    (tmp_path / "base").symlink_to(finished.parent / "base")
    arguments = ["evaluate", NAME, "--data", str(finished.parent / "suite"), "--tasks", "copy"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "user/inventory is on the hub: say with --out where" in capsys.readouterr().err
    main([*arguments, "--out", "scores.json"])
    assert read_json(tmp_path / "scores.json")["run"] == NAME
    main(["export", NAME, "--task", "copy", "--out", "adapter"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "user").exists()


def test_a_push_of_an_unfinished_run_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "run.json", {"command": "train", "config": {}})
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path), NAME])
    assert "is unfinished" in capsys.readouterr().err
    assert hub.tokens == []
