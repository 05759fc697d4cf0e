"""The study of the paper runs, and its page is that of the raw results beside it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama
from safetensors.torch import load_file

import polyroute as pr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import lm_studies  # noqa: E402
import paper  # noqa: E402
import paper_lm  # noqa: E402
import paper_lm_held_out  # noqa: E402
import paper_lm_scores  # noqa: E402
import paper_page  # noqa: E402
import paper_studies  # noqa: E402
import paper_study  # noqa: E402
import paper_tables  # noqa: E402

from polyroute.adapting.settings import AdaptSettings  # noqa: E402
from polyroute.errors import InputError  # noqa: E402
from polyroute.saved.runs import read_run  # noqa: E402


def test_the_page_is_that_of_the_results() -> None:
    text = paper_page.PAGE.read_text(encoding="utf-8")
    assert text == paper_page.page(), "run `python benchmarks/paper_page.py`"


def test_settings_of_the_language_model_were_chosen_on_development_tasks_alone() -> None:
    folder = paper_page.RESULTS / "lm"
    tasks = {role: set(names) for role, names in paper_page.read(folder, "tasks").items()}
    assert not tasks["develop"] & tasks["test"]
    assert not tasks["train"] & (tasks["develop"] | tasks["test"])
    parts = (folder, folder / "unsaid")
    looked_at = {
        "develop": [*folder.glob("apart-*.json"),
                    *(path for part in parts for path in part.glob("*develop-*.json"))],
        "train": [path for part in parts for path in part.glob("*own-tasks-*.json")],
    }  # fmt: skip
    assert looked_at["develop"]
    for role, paths in looked_at.items():
        for path in paths:
            found = {each["task"] for each in json.loads(path.read_text(encoding="utf-8"))}
            assert found <= tasks[role], path.name


def test_readers_were_looked_at_in_their_parts_alone() -> None:
    folder = paper_page.RESULTS / "lm" / "readers"
    training = set(paper_page.read(folder.parent, "tasks")["train"])
    for pattern, remainders in (("own-tasks-*", {0, 1, 2}), ("develop-*", {3}), ("test-*", {4})):
        for path in folder.rglob(f"{pattern}.json"):  # of named readers, too
            for each in json.loads(path.read_text(encoding="utf-8")):
                source, number = each["task"].split(" reader ")
                assert source in training  # texts of no task that is held out
                assert int(number) % 5 in remainders, path.name


KEPT = sorted(path.parent for path in paper_study.KEPT.glob("*/*/polyroute.json"))


@pytest.mark.parametrize("folder", KEPT, ids=lambda p: p.name)
def test_a_kept_inventory_is_that_of_a_training(folder: Path) -> None:
    training = paper_tables.read(paper_page.RESULTS / "lm", f"train-{folder.name}")
    config = read_run(folder)["config"]
    for name in ("training", "seed", "dtype"):
        assert config[name] == training[name]
    assert config.items() >= training["config"].items()
    checkpoint = pr.read_checkpoint(folder)
    tasks = paper_tables.read(paper_page.RESULTS / "lm", "tasks")["train"]
    assert list(checkpoint.tasks) == tasks
    stored = load_file(folder / "inventory.safetensors").values()
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in stored)
    assert sum(t.numel() for t in stored) == training["parameters"]["inventory"]


def test_every_way_of_the_study_has_a_title() -> None:
    as_is = {"zero-shot", "continued", *lm_studies.AS_IS}
    assert set(paper_lm_scores.WAYS) == {*as_is, *lm_studies.WAYS}
    assert set(paper_lm_scores.AS_THEY_ARE) == as_is
    assert set(paper_lm_scores.CONTENDER_TITLES) == set(lm_studies.CONTENDERS)
    assert set(paper_lm.START_TITLES) == set(lm_studies.APART)


@pytest.mark.parametrize("shared_skill", [False, True])
def test_a_mixture_of_routes_is_the_mean_of_weights(
    shared_skill: bool,
) -> None:
    config = pr.MHRConfig(
        method="poly",
        num_skills=4,
        rank=2,
        target_modules="all-linear",
        shared_skill=shared_skill,
        route_spread=3.0,
    )
    model = pr.attach(llama(), config, ["a", "b", "c"])
    weights = torch.stack([model.weights_of(task) for task in model.tasks])
    model.add_task("mean", init=paper_study.usage(model))
    torch.testing.assert_close(model.weights_of("mean"), weights.mean(0), atol=1e-5, rtol=0)


def test_rates_are_those_that_were_best_on_the_development_tasks() -> None:
    plan, compared = lm_studies.MAIN_PLAN, 0
    for name, contender in lm_studies.CONTENDERS.items():
        for way, shots in plan.developed:
            stage = f"develop-{way}-{shots}-{name}-s0"
            found = paper_tables.read(paper_page.RESULTS / "lm", stage)
            if found is not None and way in contender.rates:
                scores = {
                    rate: sum(
                        r["score_normalised"] or 0.0 for r in found if r["label"] == str(rate)
                    )
                    for rate in plan.rates
                }
                assert contender.rates[way] == max(scores, key=scores.__getitem__), stage
                compared += 1
    assert compared


def result(task: str, seed: int, score: float | None) -> dict[str, object]:
    return {"task": task, "seed": seed, "score": score, "seconds": 1.0, "trained_parameters": 3}


def test_differences_are_paired_by_task() -> None:
    ours = [result("a", 0, 0.9), result("a", 1, 0.7), result("b", 0, 0.5), result("c", 0, 1.0)]
    theirs = [result("a", 0, 0.6), result("b", 0, 0.1), result("d", 0, 0.0)]
    gap = paper_tables.difference(ours, theirs)
    assert gap.mean == pytest.approx((0.3 + 0.4) / 2)  # seed 1 of task a has no partner
    assert gap.low == pytest.approx(0.3)
    assert gap.high == pytest.approx(0.4)
    as_it_is = [{"task": "a", "score": 0.1}]
    assert paper_tables.difference(ours, as_it_is).mean == pytest.approx(0.8 - 0.1)
    assert paper_tables.by_task([result("a", 0, None), result("a", 1, 1.0)]) == {"a": 0.5}


def test_a_constant_has_no_spread_and_a_wide_sample_does() -> None:
    assert paper_tables.interval([0.5] * 9).low == pytest.approx(0.5)
    wide = paper_tables.interval([0.0, 1.0] * 50)
    assert 0.35 < wide.low < 0.45 < wide.mean < 0.55 < wide.high < 0.65


def test_every_stage_of_the_generated_study_runs_and_resumes(tmp_path: Path) -> None:
    study = paper_studies.generated(tmp_path / "work", tmp_path / "results")
    study = replace(study, train=study.train[:3], test=study.test[:2], seeds=(0, 1))
    training = replace(paper_studies.GENERATED_TRAINING, steps=3, batch_size=4)
    paper_study.train(study, "mhr-s0", "mhr", training, alignment_steps=2)
    paper_study.align(study, "aligned-mhr-s0", "mhr-s0", study.train, 4)
    scores = paper_study.zero_shot(study, "zero-shot-mhr-s0", "mhr-s0", study.test)
    assert [s["task"] for s in scores] == list(study.test)
    values = {**paper_studies.GENERATED_ADAPTATION, "steps": 2}
    settings = {"": AdaptSettings(phase="z", **values)}  # type: ignore[arg-type]
    one = replace(study, seeds=(0,))
    first = paper_study.adapt(one, "z-mhr-s0", "mhr-s0", settings, study.test)
    assert len(first) == 2
    both = paper_study.adapt(study, "z-mhr-s0", "mhr-s0", settings, study.test)
    assert [(r["task"], r["seed"]) for r in both[:2]] == [(r["task"], r["seed"]) for r in first]
    assert {(r["task"], r["seed"]) for r in both} == {(t, s) for t in study.test for s in (0, 1)}
    continued = replace(training, phase="mu")
    paper_study.train(study, "mhr-continued-s0", "mhr", continued, start="mhr-s0")
    tuned = paper_study.finetune(
        one,
        "fine-tuning-s0",
        AdaptSettings(phase="mu", **values),
        study.test[:1],  # type: ignore[arg-type]
    )
    assert tuned[0]["trained_parameters"] > 800_000
    names = {path.name for path in (tmp_path / "results" / "generated").iterdir()}
    assert {"train-mhr-s0.json", "alignment-mhr-s0.json", "aligned-mhr-s0.json"} <= names
    kept = json.loads(
        (tmp_path / "results" / "generated" / "train-mhr-continued-s0.json").read_text()
    )
    assert kept["start"] == "mhr-s0"
    assert kept["parameters"]["inventory"] == kept["parameters"]["one_adapter"]


@pytest.mark.slow
def test_a_part_of_the_held_out_table_trains_only_where_a_result_is_missing(
    tmp_path: Path,
) -> None:
    study = paper_studies.generated(tmp_path / "work", tmp_path / "results")
    study = replace(
        study, train=study.train[:3], develop=study.test[2:3], test=study.test[:2],
        text=study.test[4:5], seeds=(42, 1024), max_examples=2,
    )  # fmt: skip
    inventories = {"shared": {"method": "shared", "rank": 4}, "mhr": {**lm_studies.MHR}}
    study = replace(study, inventories=inventories)
    training = replace(paper_studies.GENERATED_TRAINING, steps=2, batch_size=4)
    few = [(way, 32) for way in ("mu-nearest", "mu", "random", "z")] + [("mu", 8)]
    plan = replace(
        lm_studies.MAIN_PLAN,
        training=training,
        continued=replace(training, phase="mu"),
        continued_rates=(1e-4, 1e-3),
        seeds=(0,),
        cells={cell: {**lm_studies.MAIN_PLAN.cells[cell], "steps": 1} for cell in few},
        rates=(1e-3, 1e-2),
    )
    ways = {"shared": ("mu", "random"), "mhr": ("mu-nearest", "z")}
    contenders = {
        name: lm_studies.Contender(name, dict.fromkeys(own, 3e-3), is_continued=name == "mhr")
        for name, own in ways.items()
    }
    paper.run_main(study, plan, contenders, ("test", "text"))
    cells = {"shared": ("mu-32", "mu-8", "random-32"), "mhr": ("mu-nearest-32", "z-32")}
    expected = {f"test-{cell}-{name}-s0" for name, own in cells.items() for cell in own}
    names = ("base", "shared-s0", "mhr-s0")
    expected |= {"test-continued-mhr-s0", *(f"test-zero-shot-{name}" for name in names)}
    assert {path.stem for path in study.results.glob("test-*")} == expected
    written = {"mu-32-shared-s0", "random-32-shared-s0", "mu-nearest-32-mhr-s0"}
    written |= {f"zero-shot-{name}" for name in names}
    assert {path.stem for path in study.results.glob("text-*")} == {f"text-{w}" for w in written}
    shutil.rmtree(study.work / study.name / "mhr-s0")
    paper.run_main(study, plan, contenders, ("test",))
    assert not (study.work / study.name / "mhr-s0").exists()
    study.file("test-z-32-mhr-s0").unlink()
    paper.run_main(study, plan, contenders, ("test",))
    assert (study.work / study.name / "mhr-s0" / "polyroute.json").exists()
    assert study.file("test-z-32-mhr-s0").exists()
    # Rates are chosen on other tasks, where each contender tries all of them.
    paper.run_main(study, plan, contenders, ("own", "develop"))
    continued = study.read("develop-continued-mhr-s0")
    assert [(r["label"], r["task"]) for r in continued] == [
        (rate, task) for rate in ("0.0001", "0.001") for task in study.develop
    ]
    developed = {path.stem: json.loads(path.read_text()) for path in study.results.glob("dev*")}
    stages = ("zero-shot-base", "zero-shot-shared-s0", "zero-shot-mhr-s0", "mu-32-shared-s0",
              "random-32-shared-s0", "mu-nearest-32-mhr-s0")  # fmt: skip
    rules = [f"{rule}-mhr-s0" for rule in (*lm_studies.AS_IS, "continued")]
    assert set(developed) == {f"develop-{stage}" for stage in (*stages, *rules)}
    for name in ("base", "shared-s0", "mhr-s0"):
        assert [r["task"] for r in study.read(f"own-tasks-{name}")] == list(study.train)
    assert study.read("own-tasks-mhr-s0") != study.read("own-tasks-shared-s0")
    found = [(r["label"], r["task"], r["seed"]) for r in developed["develop-mu-nearest-32-mhr-s0"]]
    assert sorted(found) == [
        (rate, task, draw)
        for rate in ("0.001", "0.01")
        for task in sorted(study.develop)
        for draw in (42, 1024)
    ]


def test_every_cell_is_named_once_and_its_settings_hold() -> None:
    for cells in (paper_studies.CELLS, paper_studies.DEVELOPMENT):
        names = [cell.name for cell in cells]
        assert len(set(names)) == len(names)
        for cell in cells:
            AdaptSettings(**cell.settings)


def test_an_interrupted_training_of_a_study_goes_on_to_the_same_inventory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = paper_study.MultiTaskTrainer.compute_loss
    ends = []
    for folder, stops in ((tmp_path / "whole", False), (tmp_path / "stopped", True)):
        study = paper_studies.generated(folder / "work", folder / "results")
        study = replace(study, train=study.train[:3])
        training = replace(paper_studies.GENERATED_TRAINING, steps=10, batch_size=4)
        if stops:
            taken = iter(range(6))

            def interrupted(*args: Any, left: Any = taken, **kwargs: Any) -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return compute(*args, **kwargs)

            monkeypatch.setattr(paper_study.MultiTaskTrainer, "compute_loss", interrupted)
            with pytest.raises(KeyboardInterrupt):
                paper_study.train(study, "mhr-s0", "mhr", training)
            monkeypatch.setattr(paper_study.MultiTaskTrainer, "compute_loss", compute)
            assert study.read("train-mhr-s0") is None
        paper_study.train(study, "mhr-s0", "mhr", training)
        assert (study.read("train-mhr-s0")["seconds"] is None) == stops
        assert not list(study.folder("mhr-s0").glob("checkpoint-*"))
        with pytest.raises(InputError, match="was started with training="):
            paper_study.train(study, "mhr-s0", "mhr", replace(training, lr=1.0))
        ends.append((study.folder("mhr-s0") / "inventory.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_tasks_that_ask_for_text_are_shown_by_their_metric(tmp_path: Path) -> None:
    metrics = {"short": "exact_match", "long": "rougeL"}

    def write(stage: str, scores: dict[str, float], **more: Any) -> None:
        results = [{"task": t, "score": s, "metric": metrics[t], **more} for t, s in scores.items()]
        (tmp_path / f"{stage}.json").write_text(json.dumps(results))

    write("text-zero-shot-base", {"short": 0.1, "long": 0.2})
    assert paper_lm_held_out._written(tmp_path) == ""
    write("text-mu-32-shared-s0", {"short": 0.5, "long": 0.3}, seed=7)
    write("text-mu-nearest-32-grouped-s0", {"short": 0.7, "long": 0.3}, seed=7)
    lines = paper_lm_held_out._written(tmp_path).splitlines()
    cells = [[cell.split(" [")[0].strip() for cell in line.split("|")[1:-1]] for line in lines]
    table = [row for row in cells if row]
    assert ["the base model as it is", "zero-shot", "0.100", "0.200", ""] in table
    shared, grouped = (paper_lm_scores.CONTENDER_TITLES[name] for name in ("shared", "grouped"))
    assert [shared, "mu", "0.500", "0.300", ""] in table
    assert [grouped, "mu from the nearest routes", "0.700", "0.300", "+0.100"] in table
