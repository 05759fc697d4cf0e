"""Super-NaturalInstructions: a folder in the layout of `allenai/natural-instructions`.

    tasks/<task>.json                     Definition, Categories, Positive Examples, Instances, ...
    splits/default/train_tasks.txt        names of tasks, one a line
    splits/default/test_tasks.txt         those held out

Every answer an instance lists is a reference; the target is one of them, drawn at random.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from polyroute.data.readers.roles import check_names
from polyroute.data.readers.superni_text import (
    Encoding,
    any_length,
    fits_in,
    named_tokenizer,
    render,
)
from polyroute.data.readers.task_table import TableSuite, TaskSource, file_key
from polyroute.data.records import cannot_read, checked
from polyroute.data.suite import Role, TaskInfo
from polyroute.errors import InputError

__all__ = ["SuperNiSuite"]

TEST_ROWS = 100
"""The first instances of a held-out task: the official subset, in which labels are balanced."""

_SPLITS = {"train": "train_tasks.txt", "held-out": "test_tasks.txt"}
_CATEGORY = re.compile(r'"Categories"\s*:\s*\[?\s*("(?:[^"\\]|\\.)*")')


class SuperNiSuite(TableSuite):
    """Super-NaturalInstructions: instructions to train on, and held-out tasks.

    A training task has a `train` split of random instances. A held-out task has `test`, its first
    100 instances, and the others, shuffled, in `train`; the published few-shot protocol, 32 for
    training and 32 for validation, is `few_shot=64` with a suite for each of its seeds 13, 42, 58.
    By default all of them are there, for a run to draw its shots from by its own seeds.

    A tokenizer makes the texts fit: examples are left out and the end of the input is cut, never
    the "Output:" at the end, which a base model's own cut would take away.

    Args:
        path: the folder; `~` is expanded.
        seed: of every random choice: instances, targets and encodings.
        per_task: most instances of a training task; None for all.
        few_shot: most instances of a held-out task besides `test`, the first half of this number
            for `train` and the others for `validation`; None to have all in `train`.
        encodings: of which each example gets one at random, such as `TK_INSTRUCT`.
        tokenizer: that of the base model, or its name; None leaves texts as long as they are.
        max_input: most tokens of a text, its end token included.
        cache_dir: where the tables go; None for the usual cache of `datasets`.

    Raises:
        InputError: the folder has another layout, a task is named twice or has no file, or there is
            no such tokenizer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seed: int = 42,
        per_task: int | None = 100,
        few_shot: int | None = None,
        encodings: Sequence[Encoding] = (Encoding(),),
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        max_input: int = 1024,
        cache_dir: str | Path | None = None,
    ) -> None:
        folder = Path(path).expanduser().resolve()
        roles = _roles(folder)
        files = {task: folder / "tasks" / f"{task}.json" for task in roles}
        check_names(files.items())
        eos, fits, identity = "</s>", any_length, ""
        if isinstance(tokenizer, str):
            tokenizer = named_tokenizer(tokenizer)
        elif not isinstance(tokenizer, PreTrainedTokenizerBase | None):
            raise InputError(f"the reader's option tokenizer must be a name, not {tokenizer!r}")
        if tokenizer is not None:
            eos, fits = str(tokenizer.eos_token or ""), partial(fits_in, tokenizer, max_input)
            identity = Hasher.hash([tokenizer, max_input])
        write = partial(_example, seed=seed, encodings=encodings, fits=fits, eos=eos)
        key = [seed, per_task, few_shot, [list(astuple(e)) for e in encodings], identity]

        def source(task: str, file: Path, role: Role) -> TaskSource:
            def records() -> Iterator[Mapping[str, Any]]:
                content = _read(file)
                rng = random.Random(f"{seed} rows {task}")
                parts = _parts(content["Instances"], role, per_task, few_shot, rng)
                rows = (
                    (f"{file}, instance {place}", write(content, place, task, split))
                    for split, places in parts.items()
                    for place in places
                )
                return checked(rows, task, str(file))

            return TaskSource(
                place=str(file),
                records=records,
                key=lambda: [*file_key(file), role, *key],
                info=lambda: TaskInfo(_category(file), "rougeL", role, False),
            )

        super().__init__(
            folder.name,
            {task: source(task, files[task], role) for task, role in roles.items()},
            cache_dir,
        )


def _example(
    content: Mapping[str, Any],
    place: int,
    task: str,
    split: str,
    *,
    seed: int,
    encodings: Sequence[Encoding],
    fits: Callable[[str], bool],
    eos: str,
) -> dict[str, Any]:
    """The record of one instance. Its random choices are its own, whatever else is read."""
    instance = content["Instances"][place]
    rng = random.Random(f"{seed} {place} {task}")
    references = instance["output"]
    return {
        "instruction": "",
        "input": render(
            content,
            instance["input"],
            name=task,
            encoding=rng.choice(encodings),
            fits=fits,
            eos=eos,
        ),
        "target": rng.choice(references),
        "choices": None,
        "references": references,
        "split": split,
    }


def _parts(
    instances: Sequence[Any],
    role: Role,
    per_task: int | None,
    few_shot: int | None,
    rng: random.Random,
) -> dict[str, list[int]]:
    """The instances of each split of a task, as places in its file."""
    places = list(range(len(instances)))
    test = places[:TEST_ROWS] if role == "held-out" else []
    rest = places[len(test) :]
    rng.shuffle(rest)
    if role == "train":
        return {"train": rest[:per_task]}
    half = len(rest) if few_shot is None else few_shot // 2
    return {"train": rest[:half], "validation": rest[half:few_shot], "test": test}


def _roles(folder: Path) -> dict[str, Role]:
    """The tasks that the split files name, each with its role."""
    roles: dict[str, Role] = {}
    for role, name in _SPLITS.items():
        path = folder / "splits" / "default" / name
        try:
            names = path.read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from error
        for task in names:
            if task in roles:
                raise InputError(f"{path} names the task {task!r} a second time; name it once")
            if not (folder / "tasks" / f"{task}.json").is_file():
                raise InputError(
                    f"{path} names the task {task!r}, but {folder / 'tasks'} has no {task}.json; "
                    "add the file or remove the name"
                )
            roles[task] = role  # type: ignore[assignment]
    if not roles:
        raise InputError(f"the split files in {folder / 'splits' / 'default'} name no task")
    return roles


def _category(path: Path) -> str:
    """The task's first category, without reading its instances: they come last in the file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.read(1 << 16)
            found = _CATEGORY.search(head) or _CATEGORY.search(head + file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if found is None:
        raise InputError(f"{path} has no 'Categories'; add a list of at least one")
    name: str = json.loads(found[1])
    return name.strip().lower().replace(" ", "_")


def _read(path: Path) -> dict[str, Any]:
    """A task file, with what `render` and `_example` rely on checked."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise InputError(f"{path} is not valid JSON ({error}); correct or replace it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one JSON object")
    definition = content.get("Definition")
    if not (isinstance(definition, str) or (_is_texts(definition) and definition)):
        raise InputError(f"{path}: 'Definition' must be a list of at least one string")
    for name, wanted in (("Positive Examples", str), ("Negative Examples", str)):
        for number, shown in enumerate(content.get(name, [])):
            _check_pair(shown, wanted, f"{path}, {name}, number {number}")
    instances = content.get("Instances")
    if not isinstance(instances, list):
        raise InputError(f"{path}: 'Instances' must be a list")
    for place, instance in enumerate(instances):
        if isinstance(instance, dict) and isinstance(instance.get("output"), str):
            instance["output"] = [instance["output"]]
        _check_pair(instance, list, f"{path}, instance {place}")
    return content


def _check_pair(pair: Any, output: type, where: str) -> None:
    if not isinstance(pair, dict) or not isinstance(pair.get("input"), str):
        raise InputError(f"{where}: 'input' must be a string")
    given = pair.get("output")
    if not isinstance(given, output) or (output is list and not (_is_texts(given) and given)):
        wanted = "a list of at least one string" if output is list else "a string"
        raise InputError(f"{where}: 'output' must be {wanted}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> InputError:
    if isinstance(error, OSError):
        return cannot_read(path, error)
    return InputError(f"{path} is not UTF-8 ({error.reason}); save the file as UTF-8")
