"""Every task of an inventory as a LoRA of its own, in folders that any server takes."""

import json
import shlex
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from polyroute.host.files import whole_folders, write_json, write_text
from polyroute.model import RoutedModel
from polyroute.routes.ragged import RaggedInventory
from polyroute.routes.table import MU
from polyroute.saved.peft_export import CONFIG, TENSORS, PeftTarget, peft_target
from polyroute.saved.peft_pattern import Pattern
from polyroute.saved.rows import SavedRoutes

__all__ = [
    "ADAPTERS",
    "FOR_VLLM",
    "check_exportable",
    "is_whole",
    "write_folders",
    "write_lists",
]

ADAPTERS = "adapters.json"
"""Names and folders of all adapters; written last, so that an export with it is finished."""
FOR_VLLM = "lora_modules.txt"
"""The arguments of vLLM's `--lora-modules`, quoted for a shell, one a line."""
BYTES_AT_ONCE = 2**26
"""Of adapters that are mixed together. Beyond that, the C library gives memory back after each
batch, and to take it again costs more than is saved by reading the skills less often."""
MOST_AT_ONCE = 128
WRITERS = 2
"""Threads that write: one waits for the disk while the other fills its cache."""


def check_exportable(model: RoutedModel) -> None:
    """Make sure that every task is one adapter, and that PEFT's files can hold it.

    Raises:
        InputError: the rule looks at more than the task, or PEFT would untie a weight.
    """
    model.rule.check_fixed("exported")
    _target(model)


def is_whole(folder: Path) -> bool:
    """Whether an adapter was written there."""
    return (folder / CONFIG).is_file() and (folder / TENSORS).is_file()


def write_folders(
    model: RoutedModel,
    saved: SavedRoutes | None,
    folders: Mapping[str, Path],
    card: Callable[[Path], None],
) -> Iterator[int]:
    """Write tasks, each to its folder, whole or not at all; tasks are mixed many at a time.

    Args:
        model: has the skills. If tasks have rows, it need not have them: they are read in parts,
            and whatever tasks it has are dropped.
        saved: the rows of the tasks; None if they have none.
        folders: by task, `mu` among them; all in one folder, which exists.
        card: writes a card into the folder of an adapter.

    Yields:
        How many were written, each time that some were.

    Raises:
        InputError: a task is unknown, or its row is damaged; what was written is whole.
    """
    tasks = [task for task in folders if task != MU]
    if MU in folders:
        yield _write_singly(model, {MU: folders[MU]}, card)
    parts = _with_rows(model, saved, tasks, _at_once(model))
    if isinstance(model.inventory, RaggedInventory):  # its tasks have ranks of their own
        for own in parts:
            yield _write_singly(model, {task: folders[task] for task in own}, card)
    else:
        yield from _write_together(model, parts, folders, card)


def _write_together(
    model: RoutedModel,
    parts: Iterable[Sequence[str]],
    folders: Mapping[str, Path],
    card: Callable[[Path], None],
) -> Iterator[int]:
    """Write tasks that have the same ranks; some are mixed while others are written."""
    target = _target(model)
    pattern: Pattern | None = None
    running: deque[Future[int]] = deque()
    with _mixing_alone(), ThreadPoolExecutor(WRITERS) as threads:
        for own in parts:
            pattern = pattern or _pattern(model, own[0], card)
            factors = model.mixer.factors_of([model.routes.row(task) for task in own])
            memory = pattern.filled(target.tensors(factors), len(own))
            if len(running) == WRITERS:
                yield running.popleft().result()
            paths = [folders[task] for task in own]
            running.append(threads.submit(_write_part, pattern, paths, memory))
        while running:
            yield running.popleft().result()


@contextmanager
def _mixing_alone() -> Iterator[None]:
    """Within the block torch computes in one thread, beside those that write.

    Where these take a core from one of torch's threads, all others of torch spin until it is back:
    SmolLM2's tasks took 48 ms each with two threads on two busy cores, and 10 ms with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_part(pattern: Pattern, folders: Sequence[Path], memory: Tensor) -> int:
    with whole_folders(folders[0].parent) as place:
        pattern.write([place / folder.name for folder in folders], memory)
    return len(folders)


def _target(model: RoutedModel) -> PeftTarget:
    return peft_target(model.base_model, model.sites, model.wrapping.trained)


def _at_once(model: RoutedModel) -> int:
    """How many tasks are mixed together."""
    inventory = model.inventory
    numbers = inventory.size_of_one * inventory.rank_of_average // inventory.rank
    size = numbers * inventory.like.element_size()
    size += sum(tensor.nbytes for tensor in _target(model).modules.values())
    return min(MOST_AT_ONCE, max(1, BYTES_AT_ONCE // size))


def _with_rows(
    model: RoutedModel, saved: SavedRoutes | None, tasks: Sequence[str], size: int
) -> Iterator[Sequence[str]]:
    """Yield the tasks in parts, of which the model has the rows until the next is asked for."""
    if saved is None:
        yield from (tasks[start : start + size] for start in range(0, len(tasks), size))
        return
    waiting: list[str] = []
    rows = torch.empty(0, saved.width)
    for some, places in saved.read_by_shard(tasks):
        waiting += [tasks[place] for place in places.tolist()]
        rows = torch.cat([rows, some])
        while len(waiting) >= size:
            yield _taking(model, waiting[:size], rows[:size])
            waiting, rows = waiting[size:], rows[size:]
    if waiting:
        yield _taking(model, waiting, rows)


def _taking(model: RoutedModel, tasks: Sequence[str], rows: Tensor) -> Sequence[str]:
    """The tasks, after they took the place of those that the model had."""
    model.keep_tasks([])
    model.add_tasks(tasks, rows)
    return tasks


def _write_singly(
    model: RoutedModel, folders: Mapping[str, Path], card: Callable[[Path], None]
) -> int:
    with whole_folders(next(iter(folders.values())).parent) as place:
        for task, folder in folders.items():
            model.export_peft(task, place / folder.name)
            card(place / folder.name)
    return len(folders)


def _pattern(model: RoutedModel, task: str, card: Callable[[Path], None]) -> Pattern:
    with tempfile.TemporaryDirectory() as place:
        model.export_peft(task, place)
        card(Path(place))
        return Pattern(Path(place))


def write_lists(folder: Path, adapters: Mapping[str, Path], *, for_vllm: bool) -> None:
    """Write what servers are told about all adapters of an export.

    - `lora_modules.txt`: see `FOR_VLLM`; only if they are LoRAs.
    - `adapters.json`: `[{"lora_name": ..., "lora_path": ...}]`, as SGLang takes them; LoRAX takes
      the paths.

    Args:
        folder: the folder of the export.
        adapters: the folder of each task.
        for_vllm: whether vLLM can serve them.
    """
    paths = {task: str(path.absolute()) for task, path in adapters.items()}
    if for_vllm:
        lines = [shlex.quote(_module(task, path)) for task, path in paths.items()]
        write_text(folder / FOR_VLLM, "\n".join(lines) + "\n")
    named = [{"lora_name": task, "lora_path": path} for task, path in paths.items()]
    write_json(folder / ADAPTERS, named)


def _module(task: str, path: str) -> str:
    """One argument of vLLM's `--lora-modules`, which takes `name=path` apart at "=" and "," ."""
    plain = f"{task}={path}"
    if plain.count("=") == 1 and "," not in plain and not plain.startswith("-"):
        return plain
    return json.dumps({"name": task, "path": path}, ensure_ascii=False)
