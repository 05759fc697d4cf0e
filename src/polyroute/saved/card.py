"""The model card of an inventory, written from the files of its run.

The card leaves out what the files do not say, and needs no network.
"""

import json
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from polyroute.errors import InputError
from polyroute.host.json_text import parse_json
from polyroute.host.paths import expanded
from polyroute.host.texts import byte_lines, read_text
from polyroute.saved.base_names import loading_of
from polyroute.saved.hub import CARD, HUB_ID, P3, public
from polyroute.saved.markdown import Rows, code, table
from polyroute.saved.metrics import METRICS, read_metrics
from polyroute.saved.prompting import Prompting, prompting_of
from polyroute.saved.results import ScoreTable, read_results
from polyroute.saved.rows import SavedRoutes, read_description
from polyroute.saved.runs import read_run

__all__ = ["write_card"]

LISTED = 500
"""The card lists this many tasks and only counts the others."""
MARK = "<!-- Written by polyroute from the run. Without this line the card is yours and stays. -->"
SETTINGS = {
    "phase": "phase", "objective": "objective", "steps": "optimizer steps",
    "batch_size": "examples in a step", "accumulation": "micro-batches in a step",
    "optimization": "optimization", "temperature": "temperature of task sampling",
    "cap": "cap on the size of a task in sampling", "seed": "seed",
    "dtype": "data type of the base model", "bf16": "bfloat16 autocast",
    "max_input": "longest prompt, in tokens", "max_target": "longest target, in tokens",
}  # fmt: skip
"""The settings of a run that the card shows, each with its description."""
ON_DISK = ("csv", "json", "parquet", "text")
"""Formats of local files, which a suite's YAML file may name in place of a data set."""
ADAPTERS = {"lora": "LoRA", "ia3": "(IA)^3"}


def write_card(
    folder: str | os.PathLike[str], *, name: str | None = None, license: str | None = None
) -> str:
    """The text of a model card, with its YAML header.

    A README.md in the folder that polyroute did not write is returned unchanged.

    Args:
        folder: the folder of the run, or of an inventory alone.
        name: the repository that the card is for, `user/inventory`.
        license: the licence of the inventory, as the hub spells it, such as `apache-2.0`.

    Raises:
        InputError: the folder holds no inventory or a damaged file, or a licence is given
            although the folder has a README.md that polyroute did not write.
    """
    path = Path(folder)
    own = path / CARD
    text = read_text(own) if own.is_file() else MARK
    if MARK not in text:
        if license is not None:
            raise InputError(f"{own} is the model card: write the licence there")
        return text
    return _written(path, read_description(path), name or path.resolve().name, license)


def _written(path: Path, description: Mapping[str, Any], name: str, license: str | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    run = read_run(path) if (path / "run.json").is_file() else {}
    config: Mapping[str, Any] = run.get("config", {})
    base = _base(description, config)
    measured = read_results(path)
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
        _use(description, run, base, name, tasks, pipeline),
        _task_section(count, tasks, origin),
        _training(path, run, config),
        _licences(tasks, origin),
        *(each.section() for each in measured),
        _limits(measured, is_base_known=base is not None or loading_of(config) is not None),
    ]
    text = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _base(description: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The hub id of the base model; None if it has none, or if the name may be a local path."""
    name = config.get("model", description["base"]["name"])
    if not isinstance(name, str) or loading_of({"model": name}) is not None:
        return None
    is_old_id = "/" not in name and "model" in config  # t5-small; a run stores absolute paths
    is_id = HUB_ID.fullmatch(name) or is_old_id
    return name if is_id and not expanded(name).exists() else None


def _pipeline(base_class: str, *, is_run: bool) -> str | None:
    """The hub's name for what the base model does; None if its class does not tell."""
    # Some vision models are called ForConditionalGeneration too, but no run trains those.
    known = ("ForCausalLM", "LMHeadModel", *(["ForConditionalGeneration"] if is_run else []))
    return "text-generation" if base_class.endswith(known) else None


def _tasks(path: Path, description: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The number of tasks, and the names of the first of them."""
    if description["rows"] is None:
        names = description["tasks"]
        return len(names), names[:LISTED]
    routes = SavedRoutes(path)
    return len(routes), routes.names()[:LISTED]


# ------------------------------------------------------------------ what it is and how it is used


def _summary(description: Mapping[str, Any], base: str | None, count: int) -> str:
    config, sites = description["config"], description["sites"]
    skills, heads = description["num_skills"], config["num_heads"]
    adapter = ADAPTERS.get(config["adapter"], config["adapter"])
    rank = f" of rank {config['rank']}" if config["adapter"] == "lora" else ""
    target = f"[{base}](https://huggingface.co/{base})" if base else description["base"]["class"]
    adapters = f"{skills} {adapter} skill{'s' * (skills != 1)}{rank}"
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
    run: Mapping[str, Any],
    base: str | None,
    name: str,
    tasks: Sequence[str],
    pipeline: str | None,
) -> str:
    config, prompting = run.get("config", {}), prompting_of(run)
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
    elif (loading := loading_of(config)) is not None:
        lines += ["", loading]
    else:
        has_tokenizer = False
        lines += ["", f"# base: the {base_class} that the inventory was trained on"]
    lines.append(f'model = pr.from_pretrained(base, "{name}")')
    if pipeline is not None and has_tokenizer and tasks:
        most = f", max_new_tokens={config['max_target']}" if "max_target" in config else ""
        task = json.dumps(tasks[0], ensure_ascii=False)
        lines += [
            *(prompting or Prompting("plain")).code(),
            f"ids = model.generate(**prompt, tasks={task}{most})",
            "print(tokenizer.batch_decode(ids, skip_special_tokens=True))",
        ]
    snippet = "\n".join(lines)
    prompts = "" if prompting is None else f" {prompting.sentence()}"
    return (
        f"## Use\n\n```python\n{snippet}\n```\n\n"
        "Each call names one task, or one task for each example. For tasks that the inventory has "
        'not seen, `tasks="mu"` takes the average of the skills.'
        f"{prompts}"
    )


def _task_section(count: int, tasks: Sequence[str], origin: Mapping[str, tuple[str, str]]) -> str:
    if not tasks:
        return ""
    columns: Sequence[str] = ("task",)
    rows: Rows = [(code(task),) for task in tasks]
    if origin:
        columns = ("task", "source", "licence of the data")
        rows = [(code(task), *origin.get(task, ("", ""))) for task in tasks]
    more = f"\n\nand {count - len(tasks)} more." if count > len(tasks) else ""
    return f"## Tasks\n\n{table(columns, rows)}{more}"


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
    metrics = read_metrics(path) if (path / METRICS).is_file() else {}
    if metrics.get("trained_parameters") is not None:
        rows.append(("trained parameters", f"{metrics['trained_parameters']:,}"))
    versions = run.get("machine", {}).get("versions", {})
    if versions:
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    how = "Imported from another program's checkpoint." if run.get("command") == "import" else ""
    return "\n\n".join(filter(None, ("## Training", how, table(("setting", "value"), rows))))


# ------------------------------------------------------------------ the data


def _data_sets(data: object) -> list[str]:
    """The data sets of the hub that a suite names."""
    from polyroute.host.yaml_files import read_yaml

    if data == P3:
        return [P3]
    if not isinstance(data, str) or not data.endswith((".yaml", ".yml")):
        return []
    try:
        tasks = read_yaml(Path(data), data)["tasks"].values()
        paths = dict.fromkeys(task["path"] for task in tasks)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # the file was moved or changed after the run
    return [path for path in paths if path not in ON_DISK and not PurePath(path).is_absolute()]


def _origins(data: object, tasks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Source and licence of each task whose first record states them."""
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
        first = next(byte_lines(path), b"null").decode()
        record = parse_json(first, str(path), "correct it")
    except (OSError, ValueError):  # the file was moved or changed after the run
        return {}
    return record if isinstance(record, dict) else {}


def _licences(tasks: Sequence[str], origin: Mapping[str, tuple[str, str]]) -> str:
    named = Counter(licence for _, licence in origin.values() if licence)
    if not named:
        return ""
    silent = len(tasks) - named.total()
    rows = [*named.most_common(), *([("not stated", silent)] if silent else [])]
    return (
        "## Licences of the training data\n\nThese are the licences that the data state.\n\n"
        f"{table(('licence', 'tasks'), rows)}"
    )


# ------------------------------------------------------------------ results


def _eval_results(measured: Sequence[ScoreTable], pipeline: str | None) -> list[Any]:
    """The results in the header: for each metric, the mean over its tasks."""
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


def _limits(measured: Sequence[ScoreTable], *, is_base_known: bool) -> str:
    lines = [
        "- The inventory works only on the base model that it was trained on; loading compares the "
        "weights. The licence and the limits of the base model apply here too.",
        "- A task without a route either is adapted from examples or takes the average of the "
        "skills.",
    ]
    if not is_base_known:
        lines.append("- It was not recorded where the base model can be found.")
    if not measured:
        lines.append("- No results were recorded.")
    return "## Limits\n\n" + "\n".join(lines)
