"""Super-NaturalInstructions: a folder in the layout of `allenai/natural-instructions`.

    tasks/<task>.json                     Definition, Categories, Positive Examples, Instances, ...
    splits/default/train_tasks.txt        names of the training tasks, one per line
    splits/default/test_tasks.txt         names of the held-out tasks

Every answer that an instance lists is a reference; the target is one of them, drawn at random.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

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
from polyroute.host.json_text import parse_json
from polyroute.host.paths import check_link, expanded
from polyroute.host.texts import check_size, read_text
from polyroute.settings import check_settings, setting, whole

__all__ = ["SuperNiSettings", "SuperNiSuite"]

TEST_ROWS = 100
"""So many first instances of a held-out task are the official subset with balanced labels."""

_SPLITS = {"train": "train_tasks.txt", "held-out": "test_tasks.txt"}
_CATEGORY = re.compile(r'"Categories"\s*:\s*\[?\s*("(?:[^"\\]|\\.)*")')


def _encodings(name: str, value: Any) -> tuple[Encoding, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not value or not all(isinstance(each, Encoding) for each in value):
        raise InputError(f"{name} must be a list of Encoding, not {value!r}")
    return tuple(value)


def _tokenizer(name: str, value: Any) -> PreTrainedTokenizerBase | str | None:
    if not isinstance(value, PreTrainedTokenizerBase | str | None):
        raise InputError(f"{name} must be a name, not {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class SuperNiSettings:
    """Settings of `SuperNiSuite`.

    Raises:
        InputError: a value is not what the setting allows.
    """

    seed: int = setting(42, whole(0))
    """Seeds every random choice: of instances, targets and encodings."""
    per_task: int | None = setting(100, whole(1, optional=True))
    """The most instances of a training task; None for all."""
    few_shot: int | None = setting(None, whole(0, optional=True))
    """The most instances of a held-out task besides `test`: the first half of this number go to
    `train`, the others to `validation`. None puts all of them into `train`."""
    encodings: Sequence[Encoding] = setting((Encoding(),), _encodings)
    """Each example gets one of these at random; see `TK_INSTRUCT`."""
    tokenizer: PreTrainedTokenizerBase | str | None = setting(None, _tokenizer)
    """The tokenizer of the base model, or its name; None leaves texts at their full length."""
    max_input: int = setting(1024, whole(1))
    """The most tokens of a text, its end token included."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)


class SuperNiSuite(TableSuite):
    """Super-NaturalInstructions: instructions to train on, and held-out tasks.

    A training task has a `train` split of random instances. A held-out task has its first 100
    instances in `test` and the others, shuffled, in `train`, from which a run draws its shots by
    its own seeds. The published few-shot protocol, 32 instances for training and 32 for validation,
    is `few_shot=64` with one suite for each of the seeds 13, 42 and 58.

    A tokenizer makes the texts fit: examples are left out and the end of the input is cut, but
    never the "Output:" at the end, which the base model would cut away by itself.

    Args:
        path: the folder; `~` is expanded.
        settings: how many instances there are and what a text shows; None for the defaults.
        cache_dir: where the tables are cached; None for the usual cache of `datasets`.

    Raises:
        InputError: the folder has another layout, a task is named twice or has no file, or the
            tokenizer cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        settings: SuperNiSettings | None = None,
        *,
        cache_dir: str | Path | None = None,
    ) -> None:
        folder = expanded(path).resolve()
        roles = _roles(folder)
        files = {task: folder / "tasks" / f"{task}.json" for task in roles}
        writer = _writer(settings or SuperNiSettings())
        sources = {task: _source(task, files[task], roles[task], writer) for task in roles}
        super().__init__(folder.name, sources, cache_dir)


@dataclass(frozen=True)
class _Writer:
    """Makes the record of an instance."""

    settings: SuperNiSettings
    fits: Callable[[str], bool]
    """Whether a text is short enough."""
    eos: str
    budget: str
    """Changes when `fits` does; empty without a tokenizer."""

    @property
    def key(self) -> list[Any]:
        """What the records depend on, as JSON values."""
        given = self.settings
        encodings = [list(astuple(encoding)) for encoding in given.encodings]
        return [given.seed, given.per_task, given.few_shot, encodings, self.budget]

    def record(
        self, content: Mapping[str, Any], place: int, task: str, split: str
    ) -> dict[str, Any]:
        """The record of one instance; its random choices do not depend on other instances."""
        instance = content["Instances"][place]
        rng = random.Random(f"{self.settings.seed} {place} {task}")
        references = instance["output"]
        return {
            "instruction": "",
            "input": render(
                content,
                instance["input"],
                name=task,
                encoding=rng.choice(self.settings.encodings),
                fits=self.fits,
                eos=self.eos,
            ),
            "target": rng.choice(references),
            "choices": None,
            "references": references,
            "split": split,
        }


def _writer(settings: SuperNiSettings) -> _Writer:
    """The writer for the tokenizer of the settings; a tokenizer that is named is loaded."""
    tokenizer = settings.tokenizer
    if tokenizer is None:
        return _Writer(settings, any_length, "</s>", "")
    if isinstance(tokenizer, str):
        tokenizer = named_tokenizer(tokenizer)
    return _Writer(
        settings,
        partial(fits_in, tokenizer, settings.max_input),
        str(tokenizer.eos_token or ""),
        Hasher.hash([tokenizer, settings.max_input]),
    )


def _source(task: str, file: Path, role: Role, writer: _Writer) -> TaskSource:
    def records() -> Iterator[Mapping[str, Any]]:
        content = _read(file)
        parts = _parts(task, content["Instances"], role, writer.settings)
        rows = (
            (f"{file}, instance {place}", writer.record(content, place, task, split))
            for split, places in parts.items()
            for place in places
        )
        return checked(rows, task, str(file))

    return TaskSource(
        place=str(file),
        records=records,
        key=lambda: [*file_key(file), role, *writer.key],
        info=lambda: TaskInfo(_category(file), "rougeL", role, False),
    )


def _parts(
    task: str, instances: Sequence[Any], role: Role, settings: SuperNiSettings
) -> dict[str, list[int]]:
    """The instances of each split of a task, as places in its file."""
    places = list(range(len(instances)))
    test = places[:TEST_ROWS] if role == "held-out" else []
    rest = places[len(test) :]
    random.Random(f"{settings.seed} rows {task}").shuffle(rest)
    if role == "train":
        return {"train": rest[: settings.per_task]}
    few_shot = settings.few_shot
    half = len(rest) if few_shot is None else few_shot // 2
    return {"train": rest[:half], "validation": rest[half:few_shot], "test": test}


def _roles(folder: Path) -> dict[str, Role]:
    """The role of each task that the split files name."""
    roles: dict[str, Role] = {}
    for role, name in _SPLITS.items():
        path = folder / "splits" / "default" / name
        check_link(path)
        try:
            names = read_text(path, "utf-8-sig").split()
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
    """The first category of a task, found without parsing the instances at the end of its file."""
    check_link(path)
    check_size(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.read(1 << 16)
            found = _CATEGORY.search(head) or _CATEGORY.search(head + file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if found is None:
        raise InputError(f"{path} has no 'Categories'; add a list of at least one")
    name: str = parse_json(found[1], f"{path}: the first of its 'Categories'", "correct it")
    return name.strip().lower().replace(" ", "_")


def _read(path: Path) -> dict[str, Any]:
    """The content of a task file, after checking the parts that a record needs."""
    check_link(path)
    try:
        text = read_text(path, "utf-8-sig")
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error}); correct or replace it") from error
    content = parse_json(text, str(path), "correct or replace it")
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
