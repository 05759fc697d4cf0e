"""Reading the folders of runs, as far as a report needs them."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.host.files import read_json
from polyroute.host.paths import expanded
from polyroute.saved.metrics import METRICS, read_metrics
from polyroute.saved.runs import read_run
from polyroute.study.routing_state import COSINE, ENTROPY, in_words

__all__ = ["Result", "Run", "clean", "is_number", "read_runs"]

LARGEST = 1e100
"""Numbers beyond cannot be drawn."""
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Result:
    """One score of one task."""

    stage: str
    """`adapted`, `zero-shot` or `trained`: how the model learned the task, if at all."""
    phase: str
    shots: int | None
    setting: str
    """What else distinguishes it from other results of the run; usually empty."""
    split: str
    task: str
    metric: str
    seed: int | None
    score: float
    parameters: int | None
    """The number of parameters trained for the task."""
    seconds: float | None


@dataclass
class Run:
    """One trained inventory and everything that was measured on it."""

    name: str
    folder: Path
    method: str
    config: Mapping[str, Any]
    results: list[Result] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    """Pairs of step and loss."""
    validation: list[tuple[float, float]] = field(default_factory=list)
    """Pairs of step and validation loss; none where a run measured none."""
    entropy: list[tuple[float, float]] = field(default_factory=list)
    """Pairs of step and entropy of the mixtures; none where tasks are not routed."""
    likeness: list[tuple[float, float]] = field(default_factory=list)
    """Pairs of step and cosine between skills; none where tasks are not routed."""
    verdict: str | None = None
    """A sentence if the inventory is still one adapter."""
    alignment: Mapping[str, Any] | None = None
    inventory: Path | None = None
    """The folder of its inventory."""
    data: str | None = None
    """The path of its suite."""


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """Read folders of `polyroute train`, `import`, `adapt`, `demo`, `demo-lm` and `reproduce`.

    Returns:
        The runs, and one sentence for each missing or damaged part that was left out.

    Raises:
        InputError: a folder holds no run, or a run of a command that a report does not show.
    """
    runs: dict[Path, Run] = {}
    notes: list[str] = []
    adapted: list[Path] = []
    for folder in chain.from_iterable(map(_runs_at, folders)):
        description = read_run(folder)
        command, config = description["command"], description["config"]
        if command in ("train", "import"):
            runs[folder] = _trained(folder, config, notes)
            adapted += [path.parent for path in sorted(folder.glob("*/results.json"))]
        elif command == "adapt":
            adapted.append(folder)
        elif command == "demo":
            runs |= {run.folder: run for run in _demo(folder, notes)}
        else:
            raise InputError(
                f"{folder} is a run of `polyroute {command}`; a report shows runs of train, "
                "import, adapt, demo, demo-lm and reproduce"
            )
    for folder in dict.fromkeys(adapted):
        try:
            config = read_run(folder)["config"]
            results = list(_adaptations(read_json(folder / "results.json"), folder, notes))
            source = expanded(str(config.get("run", folder))).resolve()
        except InputError as error:
            notes.append(f"Left out: {error}.")
            continue
        if folder.parent in runs and not source.is_dir():
            source = folder.parent  # the run was moved after the adaptation
        if source not in runs:
            runs[source] = _known_by_name(source)
        runs[source].results += _told_apart(runs[source].results, results, folder.name)
    found = list(runs.values())
    for run, name in zip(found, _names([run.folder for run in found]), strict=True):
        run.name = name
    return found, notes


def _runs_at(given: str | os.PathLike[str]) -> list[Path]:
    """The folder of a run or, of a command that trains several inventories, those of its trainings.

    Raises:
        InputError: there is no run, or it has trained nothing yet.
    """
    folder = expanded(given).resolve()
    if read_run(folder)["command"] not in ("demo-lm", "reproduce"):
        return [folder]
    found = [path.parent for path in sorted(folder.glob("*/run.json"))]
    found = [path for path in found if read_run(path)["command"] == "train"]
    if not found:
        raise InputError(f"the run in {folder} has trained nothing yet; go on with --resume")
    return found


def clean(text: object) -> str:
    """Replace characters that cannot be shown in a page or a figure."""
    return UNPRINTABLE.sub("\ufffd", str(text))


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that can be drawn, which NaN is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= LARGEST


def _trained(folder: Path, config: Mapping[str, Any], notes: list[str]) -> Run:
    run = Run(folder.name, folder, clean(config.get("method", "unknown")), config)
    run.data = data if isinstance(data := config.get("data"), str) else None
    if (folder / "polyroute.json").is_file():
        run.inventory = folder
    else:
        notes.append(f"The run in {folder} has no inventory yet, so its routing is left out.")
    parameters, seconds = None, None
    metrics = _metrics(folder, notes)
    if metrics is not None:
        parameters, seconds = metrics.get("trained_parameters"), metrics.get("train_runtime")
        log = metrics["log"]
        run.losses, run.validation = _pairs(log, "loss"), _pairs(log, "eval_loss")
        run.entropy, run.likeness = _pairs(log, ENTROPY), _pairs(log, COSINE)
        run.verdict = in_words(log)
    run.alignment = _optional(folder / "alignment.json", dict, notes)
    for path in sorted(folder.glob("*.json")):
        if path.stem in ("run", "metrics", "alignment", "polyroute"):
            continue
        scores = _optional(path, dict, notes)
        if scores is not None and scores.keys() >= {"macro_average", "split", "tasks"}:
            zero = bool(scores.get("zero_shot"))
            spent = (0, None) if zero else (parameters, seconds)
            results = list(_evaluated(scores, zero, spent, path, notes))
            run.results += _told_apart(run.results, results, path.stem)
    return run


def _metrics(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The metrics of a training; if they are missing or damaged, that is noted."""
    if not (folder / METRICS).exists():
        notes.append(f"The run in {folder} is unfinished: it has no {METRICS}, hence no losses.")
        return None
    try:
        return read_metrics(folder)
    except InputError as error:
        notes.append(f"Left out: {error}.")
        return None


def _demo(folder: Path, notes: list[str]) -> Iterator[Run]:
    path = folder / "results.json"
    report = _optional(path, dict, notes)
    if report is None or not isinstance(report.get("adaptations"), list):
        notes.append(f"The demo in {folder} is unfinished, so it is left out.")
        return
    rows = [row for row in report["adaptations"] if isinstance(row, dict)]
    for method in dict.fromkeys(str(row.get("method")) for row in rows):
        run = Run(clean(method), folder / method, clean(method), {})
        own = [row for row in rows if str(row.get("method")) == method]
        run.results = list(_adaptations(own, folder, notes))
        run.inventory = folder / method if (folder / method / "polyroute.json").is_file() else None
        run.data = str(folder / "suite")
        yield run


def _known_by_name(source: Path) -> Run:
    """The run that an adaptation started from; only its method is shown."""
    try:
        config = read_run(source)["config"]
    except InputError:
        config = {}
    return Run(source.name, source, clean(config.get("method", "unknown")), config)


def _adaptations(rows: Any, folder: Path, notes: list[str]) -> Iterator[Result]:
    if not isinstance(rows, list):
        raise InputError(f"{folder / 'results.json'} is damaged: it is not a list of results")
    diverged = unread = 0
    for row in rows:
        if isinstance(row, dict) and row.get("score", 0) is None:
            diverged += 1
            continue
        if not isinstance(row, dict) or not is_number(row.get("score")) or "task" not in row:
            unread += 1
            continue
        shots = row.get("shots")
        yield Result(
            "adapted", clean(row.get("phase", "")), shots if is_number(shots) else None,
            clean(row.get("label", "")), clean(row.get("split", "")), clean(row["task"]),
            clean(row.get("metric", "")), row.get("seed"), float(row["score"]),
            *_spent(row.get("trained_parameters"), row.get("seconds")),
        )  # fmt: skip
    if diverged:
        notes.append(f"{diverged} of {len(rows)} adaptations in {folder} diverged; left out.")
    if unread:
        what = f"{unread} of {len(rows)} adaptations in {folder}"
        notes.append(f"{what} lack a score or a task; left out.")


def _evaluated(
    scores: Mapping[str, Any], zero: bool, spent: tuple[Any, Any], path: Path, notes: list[str]
) -> Iterator[Result]:
    stage, phase = ("zero-shot", "none") if zero else ("trained", "as trained")
    tasks = scores["tasks"] if isinstance(scores["tasks"], list) else []
    rows = [r for r in tasks if isinstance(r, dict) and is_number(r.get("score")) and "task" in r]
    if not rows:
        notes.append(f"Left out: {path} holds no score.")
    for row in rows:
        yield Result(
            stage, phase, 0 if zero else None, "", clean(scores["split"]), clean(row["task"]),
            clean(row.get("metric", "")), None, float(row["score"]), *_spent(*spent),
        )  # fmt: skip


def _spent(parameters: Any, seconds: Any) -> tuple[int | None, float | None]:
    return (
        int(parameters) if is_number(parameters) else None,
        float(seconds) if is_number(seconds) else None,
    )


def _told_apart(before: Sequence[Result], new: Sequence[Result], origin: str) -> Sequence[Result]:
    """Results of another file, marked with its name if the run already has results like them."""

    def ways(results: Sequence[Result]) -> set[tuple[Any, ...]]:
        return {(r.stage, r.phase, r.shots, r.setting, r.split) for r in results}

    if not ways(before) & ways(new):
        return new
    return [replace(r, setting=" ".join(filter(None, (clean(origin), r.setting)))) for r in new]


def _optional(path: Path, type_: type, notes: list[str]) -> Any:
    """The JSON of a file that may be missing; a damaged file is noted and left out."""
    if not path.exists():
        return None
    try:
        value = read_json(path)
    except InputError as error:
        notes.append(f"Left out: {error}.")
        return None
    return value if isinstance(value, type_) else None


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as distinguish it from the others."""
    depths = [1] * len(folders)
    while True:
        names = ["/".join(p.parts[-d:]) for p, d in zip(folders, depths, strict=True)]
        twice = {name for name, count in Counter(names).items() if count > 1}
        longer = [
            d + (name in twice and d < len(p.parts))
            for p, d, name in zip(folders, depths, names, strict=True)
        ]
        if longer == depths:
            return [clean(name) for name in names]
        depths = longer


def _pairs(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Pairs of step and a number that a log keeps by a name."""
    return [
        (entry["step"], entry[name])
        for entry in log
        if is_number(entry.get("step")) and is_number(entry.get(name))
    ]
