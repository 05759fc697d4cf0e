"""Results of a preset: what its stages wrote, aggregated as in the publication."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from polyroute.errors import InputError
from polyroute.host.files import read_json
from polyroute.program.reproduce.preset import Preset
from polyroute.program.reproduce.stages import Way

__all__ = ["aggregate", "summarise"]


def aggregate(results: Sequence[Mapping[str, Any]], score: str = "score") -> dict[str, Any]:
    """The published aggregate: the median over seeds of each task, then the mean over tasks.

    Publications call two numbers a standard deviation. `std_over_tasks` is the deviation of the
    medians and says how much tasks differ; `mean_std_over_seeds` is the deviation over seeds,
    averaged over tasks, and says how much a score depends on luck. Both are sample deviations
    (n - 1), and None where there is one value.

    Args:
        results: each with `task`, `seed` and the score, which is None where training diverged; such
            results are left out and counted.
        score: the name of the score.

    Raises:
        InputError: no result has the score.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(result["task"] for result in results):
        own = {r["seed"]: r[score] for r in results if r["task"] == task and r[score] is not None}
        if own:
            tasks[task] = {
                "median": statistics.median(own.values()),
                "std_over_seeds": _std(list(own.values())),
                "scores": {str(seed): value for seed, value in own.items()},
            }
    if not tasks:
        raise InputError(f"no result has a {score!r}; the tasks may need another, see --set score=")
    medians = [entry["median"] for entry in tasks.values()]
    stds = [entry["std_over_seeds"] for entry in tasks.values()]
    known = [std for std in stds if std is not None]
    return {
        "score": statistics.fmean(medians),
        "std_over_tasks": _std(medians),
        "mean_std_over_seeds": statistics.fmean(known) if known else None,
        "diverged": sum(result[score] is None for result in results),
        "tasks": tasks,
    }


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def summarise(preset: Preset, ways: Sequence[Way]) -> dict[str, Any]:
    """All results that there are so far, and what one has to know about them."""
    found = []
    rows = (preset.reference or {}).get("rows", {})
    for way in ways:
        done = [stage for stage in way.stages if stage.is_done]
        if len(done) < len(way.stages):
            continue
        results = [
            {"seed": None, **result, "score": result[preset.score]}
            for stage in done
            if stage.command != "train"
            for content in [read_json(stage.result)]
            for result in (content["tasks"] if stage.command == "evaluate" else content)
        ]
        found.append(
            {
                "method": way.method,
                "phase": way.phase,
                "trained_parameters": max(r.get("trained_parameters", 0) for r in results),
                "published": rows.get(f"{way.method} {way.phase}"),
                **aggregate(results),
            }
        )
    return {
        "aggregation": "median over seeds, then mean over tasks",
        "published_source": (preset.reference or {}).get("source"),
        "results": found,
    }
