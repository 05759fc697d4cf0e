"""T0: its training mixture from P3, one task a prompt template, and its held-out few-shot tasks.

The mixture is `bigscience/P3` on the hub, or a folder with a copy of it, or of rows processed
likewise. With the folder `few_shot` of T-Few and `templates` of promptsource the held-out tasks are
there too:

    <template>/train-*.parquet               or <template>.jsonl; such as glue_mrpc_equivalent
    few_shot/<task>/<n>_shot/<seed>_seed.jsonl
    templates/<dataset>/<subset>/templates.yaml
    raw/<dataset>/<subset>/<split>.jsonl     optional; the hub is asked otherwise

`p3.yaml` in the package names the data sets of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import datasets
import yaml

from polyroute.data.readers.p3_held_out import HeldOut, held_out_source, held_out_there
from polyroute.data.readers.p3_training import HUB, PROMPTS, Template, training_source
from polyroute.data.readers.task_table import TableSuite
from polyroute.data.records import cannot_read
from polyroute.data.suite import quiet_datasets
from polyroute.errors import InputError

__all__ = ["HUB", "P3Suite", "is_p3"]

_OTHERS = ("few_shot", "templates", "raw")


class P3Suite(TableSuite):
    """The T0 protocol: prompt templates to train on, and the 11 held-out tasks.

    A training task is named `dataset/subset/template`, with `None` for a subset that there is not;
    its rows are free text. A held-out task has the few-shot examples of one seed in `train` and
    the published evaluation split in `test`.

    Args:
        source: `bigscience/P3`, or a folder; `~` is expanded.
        few_shot: a folder of few-shot files; None for `few_shot` in the source.
        templates: a folder of promptsource files; None for `templates` in the source.
        raw: a folder of held-out data sets; None for `raw` in the source.
        tasks: what a task is: a template, or a data set with all of its templates.
        seed: of the few-shot files and of every random choice.
        validation: how many rows of each template are for validation, drawn at random.
        per_template: most training rows of each template, drawn at random; None for all.
        shots: other numbers of shots than the published ones, by held-out task.
        resample: draw the shots from the training split instead of reading few-shot files.
        all_templates: show a held-out example in every template, not in one drawn for it.
        cache_dir: where the tables go; None for the usual cache of `datasets`.

    Raises:
        InputError: there is no template of a training data set, or the hub cannot be reached.
    """

    def __init__(
        self,
        source: str | Path = HUB,
        *,
        few_shot: str | Path | None = None,
        templates: str | Path | None = None,
        raw: str | Path | None = None,
        tasks: Literal["template", "dataset"] = "template",
        seed: int = 42,
        validation: int = 100,
        per_template: int | None = None,
        shots: Mapping[str, int] | None = None,
        resample: bool = False,
        all_templates: bool = False,
        cache_dir: str | Path | None = None,
    ) -> None:
        folder = None if str(source) == HUB else Path(source).expanduser().resolve()
        places = _local(folder) if folder else _of_hub()
        table = _table()
        chosen: dict[str, list[Template]] = {}
        for group, names in _grouped(places, table).items():
            size, category = table.sizes[group]
            for name in names:
                template = Template(
                    name=name,
                    place=places[name],
                    category=category,
                    most=min(size, table.cap // len(names)),
                    seed=seed,
                    validation=validation,
                    per_template=per_template,
                )
                if name not in table.left_out:
                    rest = name[len(_prefix(group)) :]
                    task = group if tasks == "dataset" else f"{group}/{rest}"
                    chosen.setdefault(task, []).append(template)
        sources = {task: training_source(task, parts, cache_dir) for task, parts in chosen.items()}
        inside = {name: folder / name if folder else None for name in _OTHERS}
        settings = HeldOut(
            few_shot=Path(few_shot) if few_shot else inside["few_shot"],
            templates=Path(templates) if templates else inside["templates"],
            raw=Path(raw) if raw else inside["raw"],
            seed=seed,
            resample=resample,
            all_templates=all_templates,
            cache_dir=cache_dir,
        )
        for task, entry in table.held_out.items():
            if held_out_there(task, settings):
                entry = {**entry, "shots": (shots or {}).get(task, entry["shots"])}
                sources[task] = held_out_source(task, entry, settings)
        if not sources:
            raise InputError(
                f"{source} has no prompt template of a training data set of T0, such as "
                "glue_mrpc_equivalent, and no few-shot files"
            )
        super().__init__("P3" if folder is None else folder.name, sources, cache_dir)


def is_p3(folder: Path) -> bool:
    """Whether a folder holds few-shot files, or prompt templates named as those of P3."""
    if (folder / "few_shot").is_dir():
        return True
    places = _local(folder)
    names = chain.from_iterable(_grouped(places, _table()).values())
    return any(_holds_prompts(places[name]) for name in names)


def _holds_prompts(place: Path | None) -> bool:
    """Whether a place named like a template is one: a folder, or rows of processed prompts."""
    if place is None or place.is_dir():
        return place is not None
    for path in (place.parent / f"{place.name}{ending}" for ending in (".jsonl", ".json")):
        if path.is_file():
            with path.open("rb") as file:
                return PROMPTS[0].encode() in file.read(1 << 16)
    return False


@dataclass(frozen=True)
class _Table:
    """What `p3.yaml` says."""

    cap: int
    left_out: Sequence[str]
    sizes: Mapping[str, tuple[int, str]]
    """By `dataset/subset`: the rows of its training split, and its category."""
    held_out: Mapping[str, Mapping[str, Any]]


@cache
def _table() -> _Table:
    content = yaml.safe_load(
        (files("polyroute.data.readers") / "p3.yaml").read_text(encoding="utf-8")
    )
    sizes = {
        group: (size, category)
        for category, groups in content["train"].items()
        for group, size in groups.items()
    }
    return _Table(content["cap"], content["left_out"], sizes, content["held_out"])


def _prefix(group: str) -> str:
    """What the names of all templates of a data set begin with."""
    dataset, subset = group.split("/")
    return f"{dataset}_" if subset == "None" else f"{dataset}_{subset}_"


def _grouped(places: Mapping[str, Path | None], table: _Table) -> dict[str, list[str]]:
    """The templates there are of each training data set, those left out included.

    The published cap counts them, and so does this.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(places):
        group = next((g for g in table.sizes if name.startswith(_prefix(g))), None)
        if group is not None and not name.endswith("_score_eval"):
            found.setdefault(group, []).append(name)
    return found


def _local(folder: Path) -> dict[str, Path | None]:
    """Every folder and file of rows, by the name of a template."""
    base = folder / "data" if (folder / "data").is_dir() else folder
    try:
        entries = sorted(base.iterdir())
    except OSError as error:
        raise cannot_read(base, error) from error
    return {
        entry.name if entry.is_dir() else entry.stem: entry if entry.is_dir() else base / entry.stem
        for entry in entries
        if (entry.is_dir() and entry.name not in _OTHERS)
        or entry.suffix in (".parquet", ".jsonl", ".json")
    }


def _of_hub() -> dict[str, Path | None]:
    try:
        with quiet_datasets():
            return dict.fromkeys(datasets.get_dataset_config_names(HUB))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the templates of {HUB} cannot be listed ({reason}); check that the hub can be "
            "reached, or give a folder with a copy"
        ) from error
