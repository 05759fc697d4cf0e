"""Individuals as tasks: 10,000 synthetic users, one row of routing weights each.

What "Generative Modeling of Individual Behavior at Scale" does with players, in small: an inventory
is trained on thousands of users at once, one row each; users whom it has never met get a row from
20 examples; a second row, from 20 other examples, must find the first among those of all new users;
and a row that is moved toward another style must change the behaviour accordingly.

    python benchmarks/users.py [--quick] [--work FOLDER] [--out benchmarks/results]

Every stage writes its result to `--work`; run the same command again to continue. The structure and
the rates of training were chosen in short runs on 2,000 other users, and the rates of fitting are
chosen here, on training users. The new users are looked at once. For comparison the report has
chance, the nearest histogram of the chosen operations, the best possible identifier, and LoRAs of
their own for some of the users.

Shape letters are those of `users_data.py`; N, H, K are routers, heads and skills, r the rank.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import users_data as data
from torch import Tensor
from users_measures import compare_lora, cosines, delta_cosines, predict, same_archetype, steer
from users_report import HALVES, chance, draw, in_markdown, ranks, rounded, summary
from users_study import (
    QUICK,
    WAYS,
    Settings,
    Study,
    fit,
    inventory,
    name,
    routes_of,
    train,
    without_inventory,
)

from polyroute.host.files import read_tensors, write_json, write_tensors
from polyroute.model import RoutedModel
from polyroute.saved.runs import machine


def tune(study: Study, models: Mapping[str, RoutedModel]) -> dict[str, Any]:
    """Choose the learning rate of each way of fitting, by how well it finds training users.

    Of these users the inventory knows the first half of the examples. That is the same for all
    rates.
    """
    settings = study.settings
    who = np.arange(settings.tuning_users)
    report = study.done("tuning.json") or {}
    lists = (settings.fit_lrs, settings.lora_lrs, settings.fresh_lrs)
    for way, rates in zip(WAYS, lists, strict=True):
        found = report.setdefault(way, {"rates": {}})["rates"]
        for rate in rates:
            if str(rate) in found:
                continue
            enrolled, probe = (fit(study, models[way], who, half, way, rate) for half in HALVES)
            if way == "row":
                rows = {"enrolled": routes_of(enrolled), "probe": routes_of(probe)}
                similarity = cosines(models[way], rows, who)
            else:
                similarity = delta_cosines(enrolled, probe)
            loss = float(np.mean([r.last_loss for r in enrolled]))
            found[str(rate)] = {**summary(ranks(similarity)), "last_loss": loss}
            print(f"{way} at {rate:g}:", found[str(rate)], flush=True)
            write_json(study.work / "tuning.json", report)
        best = max(rates, key=lambda rate: float(found[str(rate)]["mean_reciprocal_rank"]))
        report[way]["chosen"] = best
    return report


def fit_rows(
    study: Study, model: RoutedModel, rate: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rows `[U, N, H, K]` of all new users from either half."""
    path = study.work / "rows.safetensors"
    report = study.done("fitting.json") or {}
    if report:
        return read_tensors(path), report
    rows = {}
    for half in HALVES:
        started = time.perf_counter()
        results = fit(study, model, study.new, half, "row", rate)
        rows[half] = routes_of(results)
        report[half] = {
            "seconds": time.perf_counter() - started,
            "first_loss": float(np.mean([r.first_loss for r in results])),
            "last_loss": float(np.mean([r.last_loss for r in results])),
        }
        print(f"{half} rows of {len(results)} users:", report[half], flush=True)
    write_tensors(path, rows)
    write_json(study.work / "fitting.json", report)
    return rows, report


def run(settings: Settings, work: Path) -> dict[str, Any]:
    """Every stage that is not done yet, and all that came out."""
    work.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(asdict(settings)))
    note = work / "settings.json"
    if note.exists() and json.loads(note.read_text()) != asked:
        raise SystemExit(f"{work} holds a study with other settings; name another --work")
    write_json(note, asked)
    study = Study(settings, work)
    report: dict[str, Any] = {"settings": asked, "training": train(study)}
    model = inventory(study)
    models = {"row": model, "lora": model, "fresh lora": without_inventory(study)}
    report["tuning"] = tune(study, models)
    rates = {way: report["tuning"][way]["chosen"] for way in WAYS}
    rows, report["fitting"] = fit_rows(study, model, rates["row"])
    similarity = cosines(model, rows, study.new)
    halves = [slice(0, settings.shots), slice(settings.shots, 2 * settings.shots)]
    seen, later = (data.counts(study.users, study.new, half) for half in halves)
    alpha = data.prior(settings.population, study.users.preferred)
    best = np.concatenate(
        [data.best_similarity(later[i : i + 50], seen, alpha) for i in range(0, len(later), 50)]
    )
    places = {
        "rows": ranks(similarity),
        "histogram": ranks(data.histogram_similarity(later, seen)),
        "best possible": ranks(best),
    }
    report["identification"] = {
        **{label: summary(found) for label, found in places.items()},
        "chance": chance(len(study.new)),
        "ranks": {label: found.tolist() for label, found in places.items()},
    }
    print({k: v for k, v in report["identification"].items() if k != "ranks"}, flush=True)
    report["lora"] = compare_lora(study, models, rates, similarity, best)
    model.add_tasks([name(u) for u in study.new])
    for user, row in zip(study.new, rows["enrolled"], strict=True):
        model.routes[name(user)] = row
    report["steering"] = steer(study, model, rows["enrolled"])
    report["prediction"] = predict(study, model)
    model.keep_tasks([name(u) for u in study.new])
    report["archetype_of_nearest"] = same_archetype(study, model)
    report["archetypes"] = study.users.archetype[study.new].tolist()
    report["machine"] = machine()
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--work", type=Path, help="default runs/users, with --quick runs/quick")
    parser.add_argument("--out", type=Path, help="default benchmarks/results, with --quick --work")
    options = parser.parse_args(arguments)
    work = options.work or Path("runs/quick" if options.quick else "runs/users")
    # A trial must not take the place of the results.
    out = options.out or (work if options.quick else Path("benchmarks/results"))
    # Rounded first: the tables are those of the file.
    report = rounded(run(QUICK if options.quick else Settings(), work))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "users.json", report)
    text = in_markdown(report)
    (out / "users.md").write_text(text, encoding="utf-8")
    draw(out / "users.png", report)
    print(text)


if __name__ == "__main__":
    main()
