"""Files that are none, or say what cannot be: a sentence, and neither time nor memory is taken."""

import json
import os
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from commands_run import Capture, refused
from models import llama, routed
from safetensors.torch import load_file, save_file
from tiny_runs import train_arguments, write_suite
from unlike_loras import write_unlike
from unsigned import without_digests

import polyroute as pr
from polyroute.data.readers import prompt_templates
from polyroute.data.readers.prompt_templates import PromptTemplate
from polyroute.data.readers.roles import check_names
from polyroute.errors import InputError, fault_of
from polyroute.host import texts
from polyroute.host.files import read_json
from polyroute.host.json_text import parse_json
from polyroute.host.paths import expanded
from polyroute.host.yaml_files import parse_yaml, read_yaml
from polyroute.program.cli.app import main
from polyroute.program.commands.adapted import ResultFiles
from polyroute.program.commands.checkpoints import check_checkpoint, last_checkpoint
from polyroute.report_page import write_report

pytestmark = pytest.mark.timeout(60)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All training rows of a suite."""
    suite = pr.open_suite(path)
    return [row for task in suite.tasks for row in suite.split(task, "train")]


# ------------------------------------------------------------------ what is no file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["roles.json", "first.jsonl", "suite.yaml", "run.json"])
def test_pipes_and_devices_are_not_read(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    folder = write_suite(tmp_path / "suite")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    read = {"suite.yaml": rows_of, "run.json": read_json}.get(name)
    with pytest.raises(InputError, match=r" is a (pipe, not|device, not|link that leads)"):
        read(folder / name) if read else rows_of(folder)


def test_what_a_shell_passes_on_is_read() -> None:
    end, other = os.pipe()
    os.write(other, b"rank: 2\n")
    os.close(other)
    assert read_yaml(Path(f"/dev/fd/{end}"), "it") == {"rank": 2}
    os.close(end)


@pytest.mark.parametrize("name", ["first.jsonl", "first.csv", "first.json", "roles.json"])
def test_large_files_are_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(texts, "LONGEST_LINE", 1000)
    monkeypatch.setattr(texts, "MOST_BYTES", 2**20)
    folder = write_suite(tmp_path / "suite")
    if name.startswith("first"):
        (folder / "first.jsonl").unlink()
    (folder / name).write_bytes(b"[")
    os.truncate(folder / name, 2**24)  # takes no space on the disk
    with pytest.raises(InputError, match=rf"{name}.*(longer than 1,000|16,777,216 bytes)"):
        rows_of(folder)


@pytest.mark.parametrize("path", ["~nobody-has-this-name/x", "a\0b"])
def test_paths_that_name_nothing(path: str, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(InputError, match=r"not known here|is no path"):
        expanded(path)
    for command in (["inspect", path], ["recompress", str(tmp_path), "--out", path]):
        refused(command, capsys)


def test_the_home_folder_is_meant_by_a_tilde_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(write_unlike(tmp_path / "loras"))
    one = next(path.name for path in Path().iterdir())
    main(["recompress", f"~/loras/{one}", "--rank", "1", "--out", "~/small"])
    assert (tmp_path / "small" / "adapter_model.safetensors").is_file()
    assert not Path("~").exists()


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("number", ["9" * 400, "0x" + "f" * 290, "0x" + "f" * 5000])
def test_numbers_are_bounded(number: str) -> None:
    with pytest.raises(InputError, match="too many digits"):
        parse_yaml(f"rank: {number}", "the config")
    if number.isdecimal():
        with pytest.raises(InputError, match="too many digits"):
            parse_json(f'{{"a": {number}}}', "it", "correct it")
    assert parse_yaml("rank: 0x1f", "it") == {"rank": 31}
    assert parse_json("9" * 300, "it", "") == int("9" * 300)


def described(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """An inventory whose description was changed."""
    routed(llama()).save_pretrained(folder)
    path = without_digests(folder) / "polyroute.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["rows"].update(shards=2**40), "'rows' or 'id' is not what"),
        (lambda d: d["sites"][0].update(base_norm="x"), r"base_norm' is not a number"),
        (lambda d: d["sites"][0].update(base_norm=-1.0), r"base_norm' is not a number"),
        (lambda d: d.update(anneal_progress=10**400), "too many digits"),
    ],
)
def test_an_inventory_says_what_can_be(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        pr.from_pretrained(llama(), described(tmp_path / "inventory", change))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A folder with a LoRA."""
    return next(iter(sorted(write_unlike(tmp_path / "loras").iterdir())))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"use_rslora": "false"}, "its use_rslora is not true or false"),
        ({"fan_in_fan_out": {"a": None}}, "its fan_in_fan_out is not true or false"),
        ({"alpha_pattern": ["q"]}, "its alpha_pattern does not name layers"),
        ({"rank_pattern": "q"}, "its rank_pattern does not name layers"),
        ({"r": True}, "should have rank True"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf is not a number"),
    ],
)
def test_the_settings_of_a_lora_are_checked(
    lora: Path, fields: dict[str, Any], sentence: str
) -> None:
    path = lora / "adapter_config.json"
    clean = {"rank_pattern": {}, "alpha_pattern": {}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **clean, **fields}))
    with pytest.raises(InputError, match=f"{lora.name}.*{sentence}"):
        pr.Delta.from_peft(lora)


def test_a_lora_without_width_is_damaged(lora: Path) -> None:
    path = lora / "adapter_model.safetensors"
    tensors = {
        key: tensor[:, :0] if "lora_A" in key else tensor[:0]
        for key, tensor in load_file(path).items()
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(InputError, match="has a width of 0"):
        pr.Delta.from_peft(lora)


@pytest.mark.parametrize(
    "value", ["2020-01-01", "!!set {q}", "!!binary aGk=", "[[a]]", "{a: b}", "[yes]"]
)
def test_a_config_gives_texts_and_numbers(tmp_path: Path, value: str, capsys: Capture) -> None:
    (tmp_path / "c.yaml").write_text(f"tasks: {value}\n")
    given = ["train", "--config", str(tmp_path / "c.yaml"), "--data", "none", "--out", "none"]
    assert f"config key 'tasks' in {tmp_path / 'c.yaml'} cannot be" in refused(given, capsys)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("shared-skill: []", "config key 'shared-skill'"),
        ('shared-skill: ""', "config key 'shared-skill'"),
        ("skills: 12:30", "Invalid value for '--skills'"),
        ("skills: 010", "begins with 0"),
    ],
)
def test_a_config_says_nothing_by_accident(
    tmp_path: Path, line: str, sentence: str, capsys: Capture
) -> None:
    (tmp_path / "c.yaml").write_text(f"{line}\n")
    given = ["train", "--config", str(tmp_path / "c.yaml"), "--data", "none", "--out", "none"]
    assert sentence in refused(given, capsys)


# ------------------------------------------------------------------ data


HUB = "tasks: {{t: {{path: {path}, columns: {{input: a, target: b}}, {more}}}}}\n"


@pytest.mark.parametrize(
    ("path", "more", "sentence"),
    [
        ("/", "", "/ has more than 100,000 files below it"),
        ("csv", 'data_files: "/*/**/*.csv"', "/ has more than 100,000 files below it"),
        ("csv", "data_files: {train: {a: {b: d.csv}}}", "'data_files' must be the name of a file"),
        ("csv", "data_files: {train: ''}", "'data_files' must be the name of a file"),
        ("csv", "data_files: null.csv", "null.csv is a device, not a file"),
        ("csv", "data_files: d.csv, category: 2020-01-01", "'category' must be a string"),
        ("csv", "data_files: d.csv, category: !!set {a}", "'category' must be a string"),
    ],
)
def test_a_suite_of_data_sets_takes_what_it_names(
    tmp_path: Path, path: str, more: str, sentence: str
) -> None:
    (tmp_path / "d.csv").write_text("a,b\n1,2\n")
    device(tmp_path / "null.csv")
    (tmp_path / "hub.yaml").write_text(HUB.format(path=path, more=more))
    with pytest.raises(InputError, match=sentence):
        rows_of(tmp_path / "hub.yaml")


@pytest.mark.parametrize("place", [1.7, float("inf"), -1.0, Decimal("1.7"), True])
def test_a_place_among_choices_is_a_whole_number(tmp_path: Path, place: float | Decimal) -> None:
    datasets.Dataset.from_dict({"a": ["q"], "c": [place]}).to_parquet(str(tmp_path / "d.parquet"))
    columns = "{input: a, answer: c, choices: [x, y]}"
    (tmp_path / "hub.yaml").write_text(
        f"tasks: {{t: {{path: parquet, data_files: d.parquet, columns: {columns}}}}}\n"
    )
    with pytest.raises(InputError, match="'answer' must name a column"):
        rows_of(tmp_path / "hub.yaml")


def test_a_saved_data_set_names_files_of_its_own(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input": ["a"], "target": ["b"]})
    rows.save_to_disk(str(tmp_path / "secret"))
    shutil.copytree(tmp_path / "secret", tmp_path / "ds" / "a")
    assert [row["input"] for row in rows_of(tmp_path / "ds")] == ["a"]
    path = tmp_path / "ds" / "a" / "state.json"
    content = json.loads(path.read_text())
    [entry] = content["_data_files"]
    entry["filename"] = f"../../secret/{entry['filename']}"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"state.json names .* which is not in its folder"):
        rows_of(tmp_path / "ds")


@pytest.mark.parametrize("text", ["12:30", "1:30.5", "1:1:1"])
def test_a_time_in_yaml_is_the_text_that_it_looks_like(text: str) -> None:
    assert parse_yaml(text, "it") == text


@pytest.mark.parametrize("number", ["010", "-07", "0_7"])
def test_a_number_that_begins_with_zero_is_refused(number: str) -> None:
    with pytest.raises(InputError, match="begins with 0, as those in base 8 do"):
        parse_yaml(f"a: {number}", "it")


def test_half_a_surrogate_pair_names_no_task(tmp_path: Path) -> None:
    row = {"input": "x", "target": "y", "task": "\ud800"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match="field 'task'"):
        pr.open_suite(tmp_path / "rows.json")


def test_a_name_is_no_longer_than_a_folder_can_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot name a folder of results") as refusal:
        check_names([("x" * 2**20, tmp_path)])
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%*d' % (99999999999, 1) }}",
        "{{ '%(a)200000d' % {'a': 1} }}",
        "{{ (range(99999) | list) * 99999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
)
def test_a_template_makes_nothing_large(jinja: str, tmp_path: Path) -> None:
    template = PromptTemplate("large", jinja, None, True, tmp_path / "templates.yaml")
    with pytest.raises(InputError, match=r"templates.yaml: the template 'large' asks for too much"):
        template.prompt({})


def test_a_template_may_count_and_format() -> None:
    jinja = (
        "{% for i in range(3) %}{{ '%05.1f' % (i * 2) }}{{ '-' * 3 }}{{ 2 ** 3 }}{% endfor %}||| "
    )
    template = PromptTemplate("small", jinja, None, True, Path("templates.yaml"))
    assert template.prompt({}) == "000.0---8002.0---8004.0---8"
    column = PromptTemplate("column", "{{ range }}|||", None, True, Path("templates.yaml"))
    assert column.prompt({"range": "of a column"}) == "of a column"
    assert prompt_templates.MOST == 100_000
    squares = PromptTemplate("year", "{{ year ** 2 }}|||", None, True, Path("templates.yaml"))
    assert squares.prompt({"year": 2023}) == "4092529"


# ------------------------------------------------------------------ runs


RESULT = {
    "task": "pick", "seed": 0, "label": "", "metric": "accuracy", "score": 0.5,
    "score_normalised": None, "trained_parameters": 3, "seconds": 1.5, "phase": "z", "shots": 4,
    "split": "test",
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"task": ["a"]}, {"label": ["a"]}, {"score": "x"}, {"seconds": None}, {"seed": "x"},
        {"score_normalised": "x"}, {"trained_parameters": "x"}, {"metric": ["x"]},
    ],
)  # fmt: skip
def test_results_have_their_types(tmp_path: Path, change: dict[str, Any]) -> None:
    def gathered(*results: dict[str, Any]) -> list[dict[str, Any]]:
        (tmp_path / "results.json").write_text(json.dumps(results))
        return ResultFiles(tmp_path / "results.json", tmp_path / "running", []).gather()

    assert gathered(RESULT) == [RESULT]
    with pytest.raises(InputError, match=r"results.json is damaged: it is not a list of results"):
        gathered({**RESULT, **change})
    with pytest.raises(InputError, match=r"results.json is damaged: it has a result twice"):
        gathered(RESULT, RESULT)


def test_a_kill_between_gathering_and_clearing_loses_no_result(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path / "results.json", tmp_path, [("pick", "", 0), ("pick", "", 1)])
    other = {**RESULT, "seed": 1}
    files.path.write_text(json.dumps([RESULT, other]))
    (tmp_path / "results-1.json").write_text(json.dumps([other]))
    assert files.gather() == [RESULT, other]
    assert not (tmp_path / "results-1.json").exists()


def test_a_linked_split_is_not_followed(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input": ["a"], "target": ["b"]})
    rows.save_to_disk(str(tmp_path / "elsewhere"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "ds" / "a"))
    (tmp_path / "ds" / "a" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        rows_of(tmp_path / "ds")


@pytest.fixture
def adapted(run: Path, tmp_path: Path) -> Path:
    """A copy of a run with an adaptation in it."""
    folder = shutil.copytree(run, tmp_path / "=cmd|calc!A1")
    (folder / "adapt-z-4").mkdir()
    config = {"run": str(folder), "phase": "z"}
    (folder / "adapt-z-4" / "run.json").write_text(
        json.dumps({"command": "adapt", "config": config})
    )
    (folder / "adapt-z-4" / "results.json").write_text(json.dumps([RESULT]))
    return folder


@pytest.mark.parametrize("source", ["~nobody-has-this-name/x", "a\0b"])
def test_a_report_leaves_out_what_names_nothing(adapted: Path, source: str, tmp_path: Path) -> None:
    path = adapted / "adapt-z-4" / "run.json"
    content = json.loads(path.read_text())
    content["config"]["run"] = source
    path.write_text(json.dumps(content))
    write_report([adapted], tmp_path / "r.html")
    assert "Left out" in (tmp_path / "r.html").read_text()


def test_a_report_says_what_has_no_score(adapted: Path, tmp_path: Path) -> None:
    path = adapted / "adapt-z-4" / "results.json"
    path.write_text(json.dumps([RESULT, {**RESULT, "score": "x"}]))
    write_report([adapted], tmp_path / "r.html")
    assert "1 of 2 adaptations" in (tmp_path / "r.html").read_text()


def test_no_cell_of_a_report_is_a_formula(adapted: Path, tmp_path: Path) -> None:
    write_report([adapted], tmp_path / "r.html")
    for path in (tmp_path / "r-files").glob("*.csv"):
        for line in path.read_text().splitlines():
            assert not {cell.strip('"')[:1] for cell in line.split(",")} & set("=+@"), (path, line)


@pytest.mark.parametrize("losses", [(1e308, -1e308), (10**299, 1)])
def test_a_report_draws_what_can_be_drawn(
    adapted: Path, tmp_path: Path, losses: tuple[float, float]
) -> None:
    path = adapted / "metrics.json"
    content = json.loads(path.read_text())
    content["log"] = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    path.write_text(json.dumps(content))
    write_report([adapted], tmp_path / "r.html")
    results = adapted / "adapt-z-4" / "results.json"
    results.write_text(json.dumps([{**RESULT, "shots": 10**299}]))
    write_report([adapted], tmp_path / "r.html")


@pytest.mark.parametrize("out", ["", "."])
def test_a_report_is_no_folder(run: Path, out: str, capsys: Capture) -> None:
    assert "is a folder" in refused(["report", str(run), "--out", out], capsys)


@pytest.mark.parametrize("content", ["null", "[]", '""', '{"peft_type": true}'])
def test_an_adapter_says_what_it_is(lora: Path, content: str, capsys: Capture) -> None:
    main(["check", str(lora), "--quiet"])
    (lora / "adapter_config.json").write_text(content)
    assert "does not say what the adapter is" in refused(["check", str(lora)], capsys)


def test_a_run_says_which_command_wrote_it(run: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "run.json").write_text("[]")
    assert "run.json is damaged: it has no command" in refused(["check", str(folder)], capsys)


def test_a_checkpoint_without_its_manifest_is_not_resumed(place: Path) -> None:
    main(train_arguments(place, "kept", "--save-steps", "4", "--overwrite"))
    newest = last_checkpoint(place / "kept")
    assert newest is not None
    assert fault_of(check_checkpoint, newest) is None
    (newest / "manifest.json").unlink()
    assert fault_of(check_checkpoint, newest) == f"{newest / 'manifest.json'} is missing"
    assert last_checkpoint(place / "kept") != newest


def test_weights_may_be_large(lora: Path) -> None:
    library = pr.Library.from_peft(lora.parent)
    merged = library.merge("arithmetic", weights={lora.name: 10**30})
    assert torch.isfinite(torch.tensor(merged.norm()))
