"""The model card of an inventory, written from the files of its run.

What the files do not say is left out; nothing is asked of the network.
"""

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from polyroute.errors import InputError
from polyroute.host.files import read_json
from polyroute.saved.hub import CARD, HUB_ID, public
from polyroute.saved.rows import SavedRoutes, read_description

__all__ = ["write_card"]

LISTED = 500
"""More tasks than these are counted, not listed."""
MARK = "<!-- Written by polyroute from the run. Without this line the card is yours and stays. -->"
FOLDED = 20
"""A longer table opens on a click."""
SETTINGS = {
    "phase": "phase", "objective": "objective", "steps": "optimizer steps",
    "batch_size": "examples in a step", "accumulation": "micro-batches in a step",
    "optimization": "optimization", "temperature": "temperature of task sampling",
    "cap": "size above which a task counts no more", "seed": "seed", "dtype": "base model in",
    "bf16": "bfloat16 autocast", "max_input": "most tokens of a prompt",
    "max_target": "most tokens of a target",
}  # fmt: skip
"""Settings of a run that are worth a line, in words."""
P3 = "bigscience/P3"
ON_DISK = ("csv", "json", "parquet", "text")
"""Formats that a suite's YAML file may name where others have a data set of the hub."""
ADAPTERS = {"lora": "LoRA", "ia3": "(IA)^3"}
Rows = Sequence[Sequence[object]]


@dataclass(frozen=True)
class _Measured:
    """One table of results: every task once."""

    title: str
    how: str
    suite: str
    split: str
    columns: tuple[str, ...]
    rows: Rows
    scores: Mapping[str, list[float]]
    """By metric, the scores of its tasks."""


def write_card(
    folder: str | os.PathLike[str], *, name: str | None = None, license: str | None = None
) -> str:
    """The text of a model card, with its YAML header.

    A README.md in the folder that somebody wrote is taken as it is.

    Args:
        folder: of the run, or of the inventory alone.
        name: the repository that it is for, `user/inventory`.
        license: of the inventory, as the hub names it, such as `apache-2.0`.

    Raises:
        InputError: the folder holds no inventory, a file of it is damaged, or there is such a
            README.md and a licence is given too.
    """
    path = Path(folder)
    own = path / CARD
    text = own.read_text(encoding="utf-8") if own.is_file() else MARK
    if MARK not in text:
        if license is not None:
            raise InputError(f"{own} is the model card: write the licence there")
        return text
    return _written(path, read_description(path), name or path.resolve().name, license)


def _written(path: Path, description: Mapping[str, Any], name: str, license: str | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    run = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    config: Mapping[str, Any] = run.get("config", {})
    base = _base(description, config)
    measured = [*_evaluations(path), *_adaptations(path)]
    count, tasks = _tasks(path, description)
    origin = _origins(config.get("data"), tasks)
    pipeline = _pipeline(description["base"]["class"], is_run=bool(config))
    adapter = description["config"]["adapter"]
    data = ModelCardData(
        library_name="polyroute",
        license=license,
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        datasets=_data_sets(config.get("data")) or None,
        pipeline_tag=pipeline,
        tags=["polyroute", "multi-task", description["config"]["method"], adapter],
        model_name=name.rpartition("/")[2],
        eval_results=_eval_results(measured, pipeline) or None,
    )
    parts = [
        MARK,
        f"# {name.rpartition('/')[2]}",
        _summary(description, base, count),
        _use(description, config, base, name, tasks, pipeline),
        _task_section(count, tasks, origin),
        _training(path, run, config),
        _licences(tasks, origin),
        *(_result(each) for each in measured),
        _limits(measured, is_base_known=base is not None or _is_local(config.get("model"))),
    ]
    text = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _base(description: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The hub id of the base model; None where it is none, or not known to be one."""
    name = config.get("model", description["base"]["name"])
    if not isinstance(name, str) or _is_local(name):
        return None
    is_old_id = "/" not in name and "model" in config  # such as t5-small: a run has paths whole
    is_id = HUB_ID.fullmatch(name) or is_old_id
    return name if is_id and not Path(name).expanduser().exists() else None


def _is_local(model: object) -> bool:
    """Whether the base model comes with polyroute or another package."""
    return model == "demo" or str(model).startswith("package:")


def _pipeline(base_class: str, *, is_run: bool) -> str | None:
    """The hub's name for what the base model does, where its class tells."""
    # Models of pictures are called ForConditionalGeneration too, but no run trains those.
    known = ("ForCausalLM", "LMHeadModel", *(["ForConditionalGeneration"] if is_run else []))
    return "text-generation" if base_class.endswith(known) else None


def _tasks(path: Path, description: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many tasks have a route or a skill of their own, and the first of their names."""
    if description["rows"] is None:
        names = description["tasks"]
        return len(names), names[:LISTED]
    table = SavedRoutes(path)
    return len(table), table.names()[:LISTED]


# ------------------------------------------------------------------ what it is and how it is used


def _summary(description: Mapping[str, Any], base: str | None, count: int) -> str:
    config, sites = description["config"], description["sites"]
    skills, heads = description["num_skills"], config["num_heads"]
    kind = ADAPTERS.get(config["adapter"], config["adapter"])
    rank = f" of rank {config['rank']}" if config["adapter"] == "lora" else ""
    target = f"[{base}](https://huggingface.co/{base})" if base else description["base"]["class"]
    adapters = f"{skills} {kind} skill{'s' * (skills != 1)}{rank}"
    method = config["method"]
    if method == "private":
        routing = "one for each task"
    elif description["rows"] is None:
        routing = f"shared by {count} task{'s' * (count != 1)}"
    else:
        mixed = f"in {heads} heads" if heads and heads > 1 else "whole"
        routing = (
            f"mixed {mixed} by the routing weights of each of {count} task{'s' * (count != 1)}"
        )
    return (
        f"An inventory of {adapters} on {len(sites)} layers of {target}, {routing} (method "
        f"`{method}`, [Caccia et al., 2023](https://arxiv.org/abs/2211.03831)). It is not a whole "
        "model: polyroute loads it onto its base model."
    )


def _use(
    description: Mapping[str, Any],
    config: Mapping[str, Any],
    base: str | None,
    name: str,
    tasks: Sequence[str],
    pipeline: str | None,
) -> str:
    base_class, dtype = description["base"]["class"], config.get("dtype")
    given = "" if dtype is None else f', dtype="{dtype}"'
    lines = ["import polyroute as pr"]
    has_tokenizer = True
    if base is not None:
        lines += [
            f"from transformers import AutoTokenizer, {base_class}", "",
            f'base = {base_class}.from_pretrained("{base}"{given})',
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        ]  # fmt: skip
    elif _is_local(config.get("model")):
        lines += ["from polyroute.loading import load_base", "",
                  f'base, tokenizer = load_base("{config["model"]}"{given})']  # fmt: skip
    else:
        has_tokenizer = False
        lines += ["", f"# base: the {base_class} that the inventory was trained on"]
    lines.append(f'model = pr.from_pretrained(base, "{name}")')
    if pipeline is not None and has_tokenizer and tasks:
        most = f", max_new_tokens={config['max_target']}" if "max_target" in config else ""
        task = json.dumps(tasks[0], ensure_ascii=False)
        lines += [
            'prompt = tokenizer("...", return_tensors="pt")',
            f"ids = model.generate(**prompt, tasks={task}{most})",
            "print(tokenizer.batch_decode(ids, skip_special_tokens=True))",
        ]
    code = "\n".join(lines)
    more = 'Each call names a task, or one for each example; `tasks="mu"` takes the average of the'
    return f"## Use\n\n```python\n{code}\n```\n\n{more} skills, for tasks that it has not seen."


def _task_section(count: int, tasks: Sequence[str], origin: Mapping[str, tuple[str, str]]) -> str:
    if not tasks:
        return ""
    columns: Sequence[str] = ("task",)
    rows: Rows = [(_code(task),) for task in tasks]
    if origin:
        columns = ("task", "source", "licence of the data")
        rows = [(_code(task), *origin.get(task, ("", ""))) for task in tasks]
    more = f"\n\nand {count - len(tasks)} more." if count > len(tasks) else ""
    return f"## Tasks\n\n{_table(columns, rows)}{more}"


def _training(path: Path, run: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    clean = public(config)
    rows = [
        (words, clean[key])
        for key, words in SETTINGS.items()
        if clean.get(key) is not None and clean[key] is not False
    ]
    if isinstance(clean.get("data"), str):
        rows.insert(0, ("data", clean["data"]))
    metrics = read_json(path / "metrics.json") if (path / "metrics.json").is_file() else {}
    if metrics.get("trained_parameters") is not None:
        rows.append(("trained parameters", f"{metrics['trained_parameters']:,}"))
    versions = run.get("machine", {}).get("versions", {})
    if versions:
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    how = "Imported from another program's checkpoint." if run.get("command") == "import" else ""
    return "\n\n".join(filter(None, ("## Training", how, _table(("setting", "value"), rows))))


# ------------------------------------------------------------------ the data


def _data_sets(data: object) -> list[str]:
    """The data sets of the hub that a suite is made of, as far as it says."""
    import yaml

    if data == P3:
        return [P3]
    if not isinstance(data, str) or not data.endswith((".yaml", ".yml")):
        return []
    try:
        tasks = yaml.safe_load(Path(data).read_text(encoding="utf-8"))["tasks"].values()
        paths = dict.fromkeys(task["path"] for task in tasks)
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return []  # it was moved or changed since
    return [path for path in paths if path not in ON_DISK and not PurePath(path).is_absolute()]


def _origins(data: object, tasks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Source and licence of tasks, as the first record of each says them; a suite may not say."""
    if not isinstance(data, str) or not Path(data).is_dir():
        return {}
    found = {}
    for task in tasks:
        for name in (f"{task}.jsonl", f"{task}.train.jsonl"):
            record = _first_record(Path(data) / name)
            said = record.get("source"), record.get("licence", record.get("license"))
            source, licence = (value if isinstance(value, str) else "" for value in said)
            if source or licence:
                found[task] = (public(source), licence)
                break
    return found


def _first_record(path: Path) -> Mapping[str, Any]:
    try:
        with path.open(encoding="utf-8") as lines:
            record = json.loads(next(lines, "null"))
    except (OSError, ValueError):  # it was moved or changed since; the card does without
        return {}
    return record if isinstance(record, dict) else {}


def _licences(tasks: Sequence[str], origin: Mapping[str, tuple[str, str]]) -> str:
    named = Counter(licence for _, licence in origin.values() if licence)
    if not named:
        return ""
    silent = len(tasks) - named.total()
    rows = [*named.most_common(), *([("not stated", silent)] if silent else [])]
    return (
        "## Licences of the training data\n\nAs the records of the data state them.\n\n"
        f"{_table(('licence', 'tasks'), rows)}"
    )


# ------------------------------------------------------------------ results


def _evaluations(path: Path) -> Iterator[_Measured]:
    for file in sorted(path.glob("evaluate-*.json")):
        with _naming(file):
            yield _evaluation(read_json(file))


def _evaluation(found: Mapping[str, Any]) -> _Measured:
    rows = found["tasks"]
    return _Measured(
        "zero-shot, by the average of the skills" if found["zero_shot"] else "tasks of training",
        "",
        _last_part(found["data"]),
        found["split"],
        ("task", "metric", "score", "majority", "chance", "examples"),
        [
            (_code(r["task"]), r["metric"], _number(r["score"]), _number(r["majority"]),
             _number(r["chance"]), r["num_examples"])
            for r in rows
        ],
        _by_metric((r["metric"], r["score"]) for r in rows),
    )  # fmt: skip


def _adaptations(path: Path) -> Iterator[_Measured]:
    for file in sorted(path.glob("*/results.json")):
        described = file.parent / "run.json"
        with _naming(file):
            results = [r for r in read_json(file) if r["score"] is not None]
            config = read_json(described)["config"] if described.is_file() else {}
            for label in dict.fromkeys(r["label"] for r in results):
                yield _adaptation([r for r in results if r["label"] == label], label, config)


def _adaptation(
    results: Sequence[Mapping[str, Any]], label: str, config: Mapping[str, Any]
) -> _Measured:
    first = results[0]
    by_task: dict[str, list[float]] = {}
    for r in results:
        by_task.setdefault(r["task"], []).append(r["score"])
    metric = {r["task"]: r["metric"] for r in results}
    chosen = "; steps were chosen by the test score" if first["chosen_by"] == "test_score" else ""
    title = f"adapted in phase {first['phase']}, {first['shots']} examples a task"
    return _Measured(
        f"{title}, {label}" if label else title,
        f"Each score is a mean over seeds, with a draw of the examples each{chosen}.",
        _last_part(config.get("data")),
        first["split"],
        ("task", "metric", "score", "standard error over seeds", "seeds"),
        [
            (_code(task), metric[task], _number(statistics.fmean(scores)),
             _number(_error(scores)), len(scores))
            for task, scores in by_task.items()
        ],
        _by_metric((metric[task], statistics.fmean(s)) for task, s in by_task.items()),
    )  # fmt: skip


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: delete it to leave it out of the card") from error


def _last_part(data: object) -> str:
    """What the card calls a suite: paths of this machine are nobody's business."""
    return P3 if data == P3 else str(public(data or "")).rpartition("/")[2]


def _by_metric(scores: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for metric, score in scores:
        found.setdefault(metric, []).append(score)
    return found


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value, which says nothing of it."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _result(measured: _Measured) -> str:
    means = [
        (metric, _number(statistics.fmean(values)), _number(_error(values)), len(values))
        for metric, values in measured.scores.items()
    ]
    where = " of ".join(filter(None, (f"split {_code(measured.split)}", _cell(measured.suite))))
    columns = ("metric", "mean", "standard error over tasks", "tasks")
    return "\n\n".join(
        (
            f"## Results: {_cell(measured.title)}",
            f"Measured on {where}. {measured.how}".strip(),
            _table(columns, means),
            _table(measured.columns, measured.rows),
        )
    )


def _eval_results(measured: Sequence[_Measured], pipeline: str | None) -> list[Any]:
    """What the header says of the results: the mean over the tasks of each metric."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=each.suite or "unknown",
            dataset_name=each.suite or "unknown",
            dataset_split=each.split,
            metric_type=metric,
            metric_value=round(statistics.fmean(values), 6),
            metric_name=f"{metric}, mean over {len(values)} tasks, {each.title}",
        )
        for each in measured
        for metric, values in each.scores.items()
    ]


def _limits(measured: Sequence[_Measured], *, is_base_known: bool) -> str:
    lines = [
        "- It works on the base model that it was trained on. The weights are compared when it is "
        "loaded; licence and limits of the base model hold here too.",
        "- A task without a route of its own has to be adapted from examples, or takes the average "
        "of the skills.",
    ]
    if not is_base_known:
        lines.append("- Where the base model can be had is not recorded with the run.")
    if not measured:
        lines.append("- No results were recorded with the run.")
    return "## Limits\n\n" + "\n".join(lines)


# ------------------------------------------------------------------ text


def _table(columns: Sequence[str], rows: Rows) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    text = "\n".join(lines)
    if len(rows) <= FOLDED:
        return text
    return f"<details><summary>{len(rows)} rows</summary>\n\n{text}\n\n</details>"


class _Code(str):
    """A code span, which is Markdown already."""


def _code(value: object) -> _Code:
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return _Code(f"{fence} {text} {fence}" if "`" in text else f"`{text}`")


def _cell(value: object) -> str:
    """Text as it stands: what names and data say is neither Markdown nor HTML."""
    text = " ".join(str(value).split())
    if not isinstance(value, _Code):
        text = re.sub(r"[\\`*<>\[\]]", r"\\\g<0>", text)
    return text.replace("|", "\\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
