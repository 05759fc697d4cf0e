"""Files that were crafted or damaged: each ends in a sentence, and none takes the machine."""

import contextlib
import fnmatch
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands_run import Capture, adapt, refused
from models import llama, routed
from safetensors.torch import load_file, save_file
from test_interruptions import equal
from tiny_runs import train_arguments
from unsigned import without_digests

import polyroute as pr
from polyroute.data.readers.roles import check_names
from polyroute.host.files import UNFINISHED, read_json, write_json
from polyroute.host.json_text import parse_json
from polyroute.host.patterns import matches
from polyroute.host.printable import printable, spreadsheet_cell
from polyroute.host.yaml_files import parse_yaml
from polyroute.program.cli.app import main
from polyroute.program.texts import names
from polyroute.saved.runs import RUNNING

SHARED = Path(os.environ.get("POLYROUTE_SHARED", Path(__file__).parents[2] / "shared"))
HOSTILE = SHARED / "cases" / "hostile"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "an alias stands for itself"),
        ("[" * 5000, "too deep|not valid YAML"),
        (f"a: {'9' * 5000}", "has too many digits"),
        ("a: 2020-13-01", "a date or a number that cannot be read"),
        ("? [a]\n: b", "a key in line 1 is a list or a mapping"),
        ("a: !!bool foo", "is not what its tag says"),
        ("a: !!int ''", "is not what its tag says"),
        ("a: !!timestamp x", "is not what its tag says"),
        ("a: 1\na: 2", "'a' in line 2 occurs twice"),
        ("a: !!python/object:os.system b", "not valid YAML"),
    ],
)
def test_yaml_is_bounded(text: str, sentence: str) -> None:
    with pytest.raises(pr.InputError, match=f"^the config.*({sentence})"):
        parse_yaml(text, "the config")


def test_aliases_are_read_while_they_are_few() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: [*a, *a]", "") == {
        "a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]],
    }  # fmt: skip
    assert parse_yaml("", "") is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "too deep"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        (f"[{'9' * 5000}]", "too many digits"),
        ("{", "is not valid JSON"),
    ],
)
def test_json_is_bounded(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(pr.InputError, match=f"^the file.*{sentence}"):
        parse_json(text, "the file", "correct it")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(pr.InputError, match=f"a.json.*{sentence}"):
        read_json(tmp_path / "a.json")


def test_patterns_end() -> None:
    assert matches(r"(.*\.)?(q|v)", "model.layers.0.q")
    assert not matches("q", "model.q")
    with pytest.raises(pr.InputError, match="is no regular expression"):
        matches("(", "q")
    with pytest.raises(pr.InputError, match="is no regular expression"):
        matches("(" * 5000, "q")
    with pytest.raises(pr.InputError, match="takes too long"):
        matches(r"(?:(a|aa)+)\1c?[ef]", "a" * 60)
    # What takes long is told at once the second time, and many that take some time together.
    with pytest.raises(pr.InputError, match="takes too long"):
        matches(r"(?:(a|aa)+)\1c?[ef]", "a")


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("a\x1b[2J\x07\x9bb\u202ec\td\n") == "a\\x1b[2J\\x07\\x9bb\\u202ec\td\n"
    assert printable("ünïcode 日本 😀") == "ünïcode 日本 😀"
    assert printable("\ud800") == "\\ud800"


@pytest.mark.parametrize("first", ["=", "+", "-", "@"])
def test_what_a_spreadsheet_would_compute_is_text(first: str) -> None:
    assert spreadsheet_cell(f"{first}1") == f"'{first}1"
    assert spreadsheet_cell("a=1") == "a=1"
    assert spreadsheet_cell(-1.5) == -1.5


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(
    place: Path, tmp_path: Path, capsys: Capture, part: str
) -> None:
    folder = shutil.copytree(place / "base", tmp_path / "base")
    content = json.loads((folder / part).read_text())
    content |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSeq2SeqLM": "evil.M",
                             "AutoTokenizer": ["evil.T", None]}, "model_type": "evil",
                "tokenizer_class": "T"}  # fmt: skip
    (folder / part).write_text(json.dumps(content))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    given = ["train", "--model", str(folder), "--data", str(place / "suite"), "--out",
             str(tmp_path / "out"), "--quiet"]  # fmt: skip
    sentence = refused(given, capsys)
    assert part != "config.json" or "code of its own, which polyroute does not run" in sentence
    assert not ran.exists()


OWN_CODE = """
from pathlib import Path
from transformers import T5Config, T5ForConditionalGeneration

class OwnConfig(T5Config):
    model_type = "own"

class OwnModel(T5ForConditionalGeneration):
    config_class = OwnConfig

Path({marker!r}).touch()
"""


def test_code_that_comes_with_a_model_runs_if_the_user_says_so(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(place / "base", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForSeq2SeqLM": "own.OwnModel"},
               "model_type": "own", "architectures": ["OwnModel"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "ran")))
    given = ["train", "--model", str(folder), "--data", str(place / "suite"), "--steps", "11",
             "--max-input", "16", "--max-target", "8", "--quiet"]  # fmt: skip
    assert "--trust-remote-code" in refused([*given, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "ran").exists()
    main([*given, "--out", str(tmp_path / "out"), "--trust-remote-code"])
    assert (tmp_path / "ran").exists()
    # No file can give it.
    (tmp_path / "options.yaml").write_text("trust-remote-code: true\n")
    words = [*given, "--config", str(tmp_path / "options.yaml"), "--out", str(tmp_path / "x")]
    assert "trust-remote-code" in refused(words, capsys)
    # A run does not remember it: whoever gets its folder is asked again.
    assert "trust" not in (tmp_path / "out" / "run.json").read_text()
    again = ["evaluate", str(tmp_path / "out"), "--data", str(place / "suite"), "--tasks", "pick"]
    assert "--trust-remote-code" in refused([*again, "--quiet"], capsys)


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    model = routed(llama())
    model.save_pretrained(tmp_path / "inventory")
    return without_digests(tmp_path / "inventory")


def changed_config(inventory: Path, **config: object) -> None:
    path = inventory / "polyroute.json"
    content = json.loads(path.read_text())
    content["config"] |= config
    path.write_text(json.dumps(content))


def test_sizes_are_compared_before_memory_is_taken(inventory: Path) -> None:
    changed_config(inventory, rank=2**31 - 1)
    with pytest.raises(pr.InputError, match=r"ask for too many skills|has shape"):
        pr.from_pretrained(llama(), inventory)
    changed_config(inventory, rank=1_000_000)
    with pytest.raises(pr.InputError, match=r"has shape .* there and .*1000000"):
        pr.from_pretrained(llama(), inventory)


def test_a_newer_format_asks_for_an_upgrade(inventory: Path) -> None:
    path = inventory / "polyroute.json"
    content = json.loads(path.read_text())
    for given, sentence in ((3, "upgrade polyroute"), (2.0, "is not in inventory format 2"),
                            (True, "is not in inventory format 2")):  # fmt: skip
        path.write_text(json.dumps({**content, "format": given}))
        with pytest.raises(pr.InputError, match=sentence):
            pr.from_pretrained(llama(), inventory)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.int32),
        lambda t: torch.full_like(t, torch.nan),
    ],
    ids=["float8", "complex", "integers", "nan"],
)
@pytest.mark.parametrize("name", ["inventory.safetensors", "routes-00000-of-00001.safetensors"])
def test_tensors_of_other_types_are_damage(
    inventory: Path, name: str, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    path = inventory / name
    tensors = load_file(path)
    with torch.no_grad():
        note = read_note(path)
        # The order of rows is of whole numbers.
        spoilt = {key: t if key == "order" else spoil(t) for key, t in tensors.items()}
        save_file({key: tensor.contiguous() for key, tensor in spoilt.items()}, path, note)
    with pytest.raises(pr.InputError, match="holds values that are not finite fractional numbers"):
        pr.from_pretrained(llama(), inventory)


def read_note(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_start_that_was_killed_early_locks_nothing(tmp_path: Path, place: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").touch()
    (run / f".run.json.abc{UNFINISHED}").write_text("{")
    main(["train", "--model", str(place / "base"), "--data", str(place / "suite"), "--steps", "1",
          "--out", str(run)])  # fmt: skip
    assert json.loads((run / "run.json").read_text())["command"] == "train"
    assert not list(run.rglob(f"*{UNFINISHED}"))


def test_written_files_can_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    routed(llama()).save_pretrained(tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_a_parquet_file_of_broken_text_is_a_sentence(tmp_path: Path, capsys: Capture) -> None:
    texts = pa.array([b"\xbd\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"input": texts, "target": ["a"]}), tmp_path / "t.parquet")
    given = ["train", "--model", "demo", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "is not a readable Parquet file" in refused(given, capsys)


def cases() -> list[tuple[Path, list[str]]]:
    """The inputs that were kept of attacks, and a command that reads each."""
    made = ["--model", "demo", "--out", "OUT"]
    commands = {
        "06-*/run": ["export", "CASE", "--task", "t0", "--out", "OUT"],
        "09-*/lora*": ["import", "CASE", *made],
        "10-*/*.yaml": ["train", "--config", "CASE", "--data", "none", "--out", "OUT"],
        "14-*/run": ["inspect", "CASE"],
        "18-*/yaml/*/c.yaml": ["train", "--config", "CASE", "--data", "none", "--out", "OUT"],
        "18-*/lora/*": ["import", "CASE", *made],
        "18-*/mttl/*/m.ckpt": ["import", "CASE", "--allow-pickle", *made],
        "18-*/inventory/*": ["inspect", "CASE"],
        "18-*/run/*": ["report", "CASE", "--out", "OUT.html"],
        "18-*/tabular/*": ["train", "--data", "CASE", *made],
    }
    return [
        (path, command)
        for pattern, command in commands.items()
        for path in sorted(HOSTILE.glob(pattern))
    ]


def test_names_that_look_alike_are_refused(tmp_path: Path) -> None:
    check_names([("Café", tmp_path)])
    with pytest.raises(pr.InputError, match="how their characters are composed"):
        check_names([("Caf\u00e9", tmp_path), ("Cafe\u0301", tmp_path)])


@pytest.mark.parametrize("name", ["con", "a/NUL.txt", "a:b", "end.", "lpt1"])
def test_names_that_windows_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check_names([(name, tmp_path)])
    monkeypatch.setattr("polyroute.data.readers.roles.os.name", "nt")
    with pytest.raises(pr.InputError, match="cannot name a folder on Windows"):
        check_names([(name, tmp_path)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".running", "a part begins with a dot"),
        ("a/.b.unfinished", "a part begins with a dot"),
        ("results.json", "'results.json' is a file that a run writes"),
        ("Run.JSON/x", "'Run.JSON' is a file that a run writes"),
        ("evaluate-test.json", "is a file that a run writes"),
        ("a\N{ZERO WIDTH JOINER}b", r"the character U\+200D \(ZERO WIDTH JOINER\), which is not"),
        ("a\N{NO-BREAK SPACE}b", r"the character U\+00A0 \(NO-BREAK SPACE\), which is not"),
    ],
)
def test_names_that_would_lose_results_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(pr.InputError, match=message):
        check_names([(name, tmp_path)])


def test_no_task_lies_in_the_results_of_another(tmp_path: Path) -> None:
    fine = ["a", "a/b", "a/seed-x/b", "b/seed-0", "c.json", "d/run.json", "my results.json"]
    check_names([(name, tmp_path) for name in fine])
    for within in ("c/seed-0", "C/Seed-12/adapter_model.safetensors"):
        with pytest.raises(pr.InputError, match="would lie in the results of the task 'c'"):
            check_names([(within, tmp_path), ("c", tmp_path)])


def test_the_files_of_an_adaptation_are_no_names_of_tasks(tmp_path: Path) -> None:
    for name in ("run.json", "results.json", RUNNING):
        with pytest.raises(pr.InputError, match="rename it"):
            check_names([(name, tmp_path)])


@pytest.mark.parametrize("make", ["jsonl", "csv", "yaml", "p3"])
def test_every_reader_refuses_such_names(tmp_path: Path, make: str) -> None:
    record = {"instruction": "", "input": "a", "target": "b", "choices": None, "split": "train"}
    name = "glue_mrpc_.x" if make == "p3" else "run.json"
    path = tmp_path
    if make in ("jsonl", "p3"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    if make == "p3":
        (tmp_path / f"{name}.jsonl").write_text('{"inputs_pretokenized": "a"}\n')
    if make == "csv":
        path = tmp_path / "a.csv"
        path.write_text(f"task,input,target\n{name},a,b\n")
    if make == "yaml":
        path = tmp_path / "a.yaml"
        path.write_text("tasks: {run.json: {path: csv, columns: {input: a, target: b}}}")
    with pytest.raises(pr.InputError, match=r"a file that a run writes|begins with a dot"):
        pr.open_suite(path)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\,b, c ,", ["a,b", "c"]),
        (r"\ lead, tail\ , b", [" lead", "tail ", "b"]),
        (r"p\\,other", ["p\\", "other"]),
        (r"p\\\,q", [r"p\,q"]),
        (r"a\b,c\d", [r"a\b", r"c\d"]),
        ("p\\", ["p\\"]),
        (None, None),
    ],
)
def test_every_name_can_be_said_in_a_list(typed: str | None, meant: list[str] | None) -> None:
    assert names(typed, "--tasks") == meant


def test_too_little_memory_says_what_to_lower(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def allocate(*_: object, **__: object) -> None:
        torch.empty(2**50)

    monkeypatch.setattr("polyroute.program.commands.train.make_trainer", allocate)
    given = ["train", "--model", str(place / "base"), "--data", str(place / "suite"), "--out",
             str(tmp_path / "out"), "--quiet"]  # fmt: skip
    assert "not enough memory" in (sentence := refused(given, capsys))
    assert "lower --batch-size or --max-input" in sentence


@pytest.mark.skipif(not HOSTILE.is_dir(), reason="the shared cases are missing")
@pytest.mark.parametrize(
    ("case", "command"), cases(), ids=[str(c.relative_to(HOSTILE)) for c, _ in cases()]
)
def test_kept_attacks_end_in_a_sentence(
    case: Path, command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    places = {"CASE": str(case), "OUT": str(tmp_path / "out"), "OUT.html": str(tmp_path / "o.html")}
    with contextlib.suppress(SystemExit):
        main([places.get(part, part) for part in command])
    out, error = capsys.readouterr()
    assert "failed" not in error
    assert not set("\x1b\x07") & set(out + error)


@pytest.mark.parametrize(
    "name", ["polyroute.json", "inventory.safetensors", "routes-00000-of-00001.safetensors"]
)
def test_links_are_not_followed_out_of_an_inventory(
    inventory: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (inventory / name).rename(elsewhere)
    (inventory / name).symlink_to(elsewhere)
    with pytest.raises(pr.InputError, match="is a link that leads out of its folder"):
        pr.from_pretrained(llama(), inventory)


def test_links_within_a_folder_and_to_a_folder_are_followed(
    inventory: Path, tmp_path: Path
) -> None:
    (inventory / "inventory.safetensors").rename(inventory / "real")
    (inventory / "inventory.safetensors").symlink_to(inventory / "real")
    (tmp_path / "link").symlink_to(inventory)
    assert pr.from_pretrained(llama(), tmp_path / "link").tasks


def test_links_are_not_followed_out_of_a_suite(tmp_path: Path, place: Path) -> None:
    (tmp_path / "suite").mkdir()
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("")
        link = tmp_path / "suite" / name
        link.symlink_to(tmp_path / name)
        with pytest.raises(pr.InputError, match="is a link that leads out of its folder"):
            pr.open_suite(tmp_path / "suite")
        link.unlink()
    (tmp_path / "whole").symlink_to(place / "suite")
    assert pr.open_suite(tmp_path / "whole").tasks


def test_a_write_replaces_a_link_and_not_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out.json").symlink_to(tmp_path / "mine")
    write_json(tmp_path / "out.json", {})
    assert (tmp_path / "mine").read_text() == "mine"
    assert read_json(tmp_path / "out.json") == {}


def half(run: Path, folder: Path) -> Path:
    """A run that was killed after its last checkpoint but one."""
    ends = ("checkpoint-12", "metrics.json", "*.safetensors", "polyroute.json")
    shutil.copytree(run, folder, ignore=lambda at, names: (
        set().union(*(fnmatch.filter(names, end) for end in ends)) if Path(at) == run else set()
    ))  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", ""]
)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_checkpoint_is_not_written_through_a_link(
    place: Path, run: Path, tmp_path: Path, name: str, is_there: bool
) -> None:
    out, elsewhere = half(run, tmp_path / "run"), tmp_path / "elsewhere"
    link = out / "checkpoint-12" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    if is_there and name:
        elsewhere.write_text("mine")
    elif is_there:
        elsewhere.mkdir()
    main([*train_arguments(place, "x"), "--out", str(out), "--resume"])
    equal(out, run)
    assert elsewhere.exists() == is_there
    assert not is_there or not name or elsewhere.read_text() == "mine"
    assert name or not is_there or not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json",
     "inventory.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_a_checkpoint_with_something_else_in_it_is_passed_over_and_written_again(
    place: Path, run: Path, tmp_path: Path, capsys: Capture, name: str, what: str
) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    (out / "metrics.json").unlink()
    path = out / "checkpoint-12" / name
    shutil.move(path, tmp_path / "elsewhere")
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert "checkpoint-12" in refused(["check", str(out)], capsys)
    main([*train_arguments(place, "x"), "--out", str(out), "--resume"])
    equal(out, run)
    main(["check", str(out), "--quiet"])


def test_an_adaptation_is_not_written_through_a_link(
    place: Path, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    given = adapt(place, run, str(tmp_path / "adapted"), "--quiet")
    main(given)
    for name in ("first", "first/seed-0", ".running"):
        out = shutil.copytree(tmp_path / "adapted", tmp_path / "again")
        if name != ".running":
            shutil.rmtree(out / name)
        (out / name).symlink_to(tmp_path / "elsewhere")
        (out / "results.json").write_text("[]")
        again = adapt(place, run, str(out), "--quiet", "--resume")
        for command in (again, ["check", str(out)]):
            assert "is a link that leads out of its folder" in refused(command, capsys)
        shutil.rmtree(out)
    assert not list((tmp_path / "elsewhere").iterdir())
    # A folder that nobody named may be a link of somebody else, too.
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "adapt-full-8").symlink_to(tmp_path / "elsewhere")
    unnamed = adapt(place, copy, "x", "--quiet")
    place_of_out = unnamed.index("--out")
    assert "is a link that leads" in refused(
        unnamed[:place_of_out] + unnamed[place_of_out + 2 :], capsys
    )


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(pr.InputError, match=r"a.json is a folder, where a file is to be written"):
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_may_not_be_read_is_said(
    inventory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def denied(path: Path, *given: Any, **named: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *given, **named)

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(Path, "open", denied)
        with pytest.raises(pr.InputError, match=r"cannot read .*safetensors: Permission denied"):
            pr.from_pretrained(llama(), inventory)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "polyroute.peft", raising=False)
    monkeypatch.setitem(sys.modules, "peft.config", None)
    with pytest.raises(ImportError, match=r"pip install polyroute\[peft\]"):
        importlib.import_module("polyroute.peft")


def test_folders_that_only_look_like_a_cache_are_none(inventory: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    folder = shutil.copytree(inventory, tmp_path / "snapshots" / "evil")
    (folder / "polyroute.json").unlink()
    (folder / "polyroute.json").symlink_to(tmp_path / "secret")
    with pytest.raises(pr.InputError, match="leads out of its folder"):
        pr.from_pretrained(llama(), folder)
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(pr.InputError, match="leads round in a circle"):
        read_json(tmp_path / "round")


def test_a_cache_of_the_hub_on_another_disk_is_read(inventory: Path, tmp_path: Path) -> None:
    repository, disk = tmp_path / "models--user--name", tmp_path / "disk"
    disk.mkdir()
    folder = shutil.copytree(inventory, repository / "snapshots" / "commit")
    (repository / "blobs").symlink_to(disk)
    for path in list(folder.iterdir()):
        path.rename(disk / path.name)
        path.symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert pr.from_pretrained(llama(), folder).tasks
