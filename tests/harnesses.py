"""What reads files of others, one harness for each, for `scripts/fuzz.py` and `test_fuzz.py`.

A harness puts bytes into a file that is read, beside files that are whole, and reads it. Nothing
but an `InputError` may come of it. Where a folder has several files, the first byte says which of
them is replaced.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from models import llama, routed
from unsigned import without_digests

import polyroute as pr
from polyroute.data.readers.files import read_rows
from polyroute.data.records import read_records
from polyroute.errors import InputError
from polyroute.exchange import read_inventory
from polyroute.exchange.mttl_export import write_mttl
from polyroute.host.json_text import parse_json
from polyroute.host.yaml_files import parse_yaml
from polyroute.report_page.data import read_runs
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.runs import read_run

Harness = Callable[[bytes, Path], None]


def _each(*calls: Callable[[], object]) -> None:
    """Call all of them, and raise the last InputError."""
    last: InputError | None = None
    for call in calls:
        try:
            call()
        except InputError as error:
            last = error
    if last is not None:
        raise last


def _put(data: bytes, place: Path, whole: Path, names: tuple[str, ...]) -> None:
    """A copy of a whole folder in which one file has other bytes."""
    name = names[data[0] % len(names)] if data else names[0]
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    (place / name).write_bytes(data[1:])


@cache
def _whole_inventory(place: Path) -> Path:
    """An inventory without digests, which would refuse most bytes before they are read."""
    folder = place.parent / "whole-inventory"
    if folder.exists():
        return folder
    routed(llama()).save_pretrained(folder)
    return without_digests(folder)


INVENTORY = ("polyroute.json", "inventory.safetensors")
LORA = ("adapter_config.json", "adapter_model.safetensors")
ROWS = ("routes-00000-of-00001.safetensors",)


def inventory(data: bytes, place: Path) -> None:
    """`polyroute.json` and the skills."""
    _put(data, place, _whole_inventory(place), INVENTORY)
    checkpoint = read_checkpoint(place)
    checkpoint.rows(checkpoint.tasks)


def rows(data: bytes, place: Path) -> None:
    """A shard of the routing table."""
    _put(data, place, _whole_inventory(place), ROWS)
    routes = pr.SavedRoutes(place)
    for name in routes.names():
        routes.read(name)
    routes.check(routes.names())


@cache
def _whole_lora(place: Path) -> Path:
    folder = place.parent / "whole-lora"
    if not folder.exists():
        routed(llama(), method="shared").export_peft("mu", folder)
    return folder


def lora(data: bytes, place: Path) -> None:
    """A folder of PEFT, as a delta and as an inventory."""
    _put(data, place, _whole_lora(place), LORA)
    _each(
        lambda: pr.Delta.from_peft(place), lambda: read_inventory(llama(), place).unload()
    )  # fmt: skip


@cache
def _whole_mttl(place: Path) -> Path:
    path = place.parent / "whole.ckpt"
    if not path.exists():
        write_mttl(routed(llama()), path)
    return path


def mttl(data: bytes, place: Path) -> None:
    """A checkpoint of mttl, which is a pickle."""
    place.mkdir(exist_ok=True)
    (place / "m.ckpt").write_bytes(data)
    read_inventory(llama(), place / "m.ckpt", allow_pickle=True).unload()


def run(data: bytes, place: Path) -> None:
    """A run, and its report."""
    place.mkdir(exist_ok=True)
    names = ("run.json", "metrics.json", "results.json", "alignment.json", "evaluate-test.json")
    (place / "run.json").write_text(json.dumps({"command": "train", "config": {"method": "mhr"}}))
    name = names[data[0] % len(names)] if data else names[0]
    for other in names[1:]:
        (place / other).unlink(missing_ok=True)
    (place / name).write_bytes(data[1:])
    _each(lambda: read_run(place), lambda: read_runs([place]))


def yaml(data: bytes, place: Path) -> None:
    """A file of options, and one of data sets."""
    text = data.decode("utf-8", "replace")
    place.mkdir(exist_ok=True)
    (place / "suite.yaml").write_bytes(data)
    _each(lambda: parse_yaml(text, "the file"), lambda: _described(place / "suite.yaml"))


def _described(path: Path) -> None:
    suite = pr.open_suite(path)
    for task in suite.tasks:
        suite.info(task)


def jsonl(data: bytes, place: Path) -> None:
    """Records line by line."""
    place.mkdir(exist_ok=True)
    (place / "a.jsonl").write_bytes(data)
    _each(
        lambda: parse_json(data.decode("utf-8", "replace"), "the text", "correct it"),
        lambda: list(read_records(place / "a.jsonl")),
    )


def tables(data: bytes, place: Path) -> None:
    """CSV, TSV, JSON and Parquet."""
    place.mkdir(exist_ok=True)
    suffixes = (".csv", ".tsv", ".json", ".parquet")
    path = place / f"a{suffixes[data[0] % len(suffixes)] if data else '.csv'}"
    path.write_bytes(data[1:])
    list(read_rows(path))


HARNESSES: Mapping[str, Harness] = {
    one.__name__: one for one in (inventory, rows, lora, mttl, run, yaml, jsonl, tables)
}


def seeds(name: str, place: Path) -> list[bytes]:
    """Whole files, to begin with."""
    whole = {
        "inventory": [_whole_inventory(place) / each for each in INVENTORY],
        "rows": [_whole_inventory(place) / each for each in ROWS],
        "lora": [_whole_lora(place) / each for each in LORA],
        "mttl": [_whole_mttl(place)],
    }.get(name, [])
    texts = {
        "run": ['{"command": "train", "config": {"method": "mhr"}}', '{"log": [{"loss": 1.5}]}',
                '[{"task": "a", "seed": 0, "score": 0.5, "phase": "z", "metric": "accuracy"}]'],
        "yaml": ["name: a\ntasks:\n  b:\n    path: c\n    columns: {input: '{x}', target: y}\n"],
        "jsonl": ['{"task": "a", "instruction": "", "input": "x", "target": "y", '
                  '"choices": null, "split": "train"}'],
        "tables": ["input,target\na,b\n", "input\ttarget\na\tb\n", '[{"input": "a"}]'],
    }.get(name, [])  # fmt: skip
    is_plain = name in ("yaml", "jsonl", "mttl")  # have one file
    found = [(b"" if is_plain else bytes([i])) + p.read_bytes() for i, p in enumerate(whole)]
    return found + [(b"" if is_plain else bytes([i])) + t.encode() for i, t in enumerate(texts)]


def holds(harness: Harness, data: bytes, place: Path) -> None:
    """Run a harness; what is wrong with the bytes must be one sentence."""
    try:
        harness(data, place)
    except InputError as error:
        text = str(error)
        assert text and len(text) < 20_000, text  # noqa: PT018 - one statement about one text
