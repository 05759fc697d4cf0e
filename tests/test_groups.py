"""An inventory starts with a group of tasks on each skill."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from base_models import bert, llama, t5
from test_adapt import examples
from tiny_runs import train_arguments, write_base, write_suite

import polyroute as pr
from polyroute.errors import InputError
from polyroute.program.cli.app import main
from polyroute.saved.runs import read_run
from polyroute.study import groups
from polyroute.study.alignment import alignment
from polyroute.study.examples import encoded_records
from polyroute.study.groups import LOGIT, balanced_groups, start_in_groups

TASKS = tuple(f"task {i}" for i in range(8))


def fresh(make: Any, **settings: Any) -> tuple[pr.RoutedModel, Any, datasets.Dataset]:
    torch.manual_seed(0)
    base, tokenizer = make()
    config = pr.MHRConfig(**{"num_skills": 4, "num_heads": 2, "rank": 1, **settings})
    model = pr.attach(base, config, TASKS)
    kind = pr.kind_of(model, tokenizer, max_input=16, max_target=4)
    rows = [row for task in TASKS for row in encoded_records(examples(task, 6), task, kind)]
    return model, kind, datasets.Dataset.from_list(rows)


def test_groups_are_those_of_like_vectors_and_of_equal_size() -> None:
    random = np.random.default_rng(0)
    planted = np.arange(22) % 4
    vectors = random.normal(size=(4, 20))[planted] + 0.3 * random.normal(size=(22, 20)) + 5
    found = np.array(balanced_groups(vectors, 4))
    assert sorted(np.bincount(found)) == [5, 5, 6, 6]
    same = planted[:, None] == planted
    assert ((found[:, None] == found) == same).all()


@pytest.mark.parametrize("make", [bert, t5, llama])
def test_every_skill_gets_its_share_of_tasks_and_the_same_a(make: Any) -> None:
    model, kind, rows = fresh(make)
    skills = start_in_groups(model, kind, rows)
    assert tuple(skills) == TASKS
    assert np.bincount(list(skills.values())).tolist() == [2, 2, 2, 2]
    for task, skill in skills.items():
        logits_NHK = model.routes[task]
        assert (logits_NHK.abs() == LOGIT).all()
        assert (logits_NHK.argmax(-1) == skill).all()
        assert ((logits_NHK > 0).sum(-1) == 1).all()
    for stack in model.inventory.stacks:
        a_nHKrD = model.inventory.get_parameter(f"lora_a.{stack.key}")
        assert torch.equal(a_nHKrD[:, :, :1].expand_as(a_nHKrD), a_nHKrD)
        assert a_nHKrD.std() > 0
    assert start_in_groups(model, kind, rows) == skills


def test_a_skill_that_is_always_on_gets_no_group_and_no_weight_is_negative() -> None:
    model, kind, rows = fresh(llama, shared_skill=True)
    skills = start_in_groups(model, kind, rows)
    assert sorted(np.bincount(list(skills.values()))) == [2, 3, 3]
    model, kind, rows = fresh(llama, normalization="l2")
    for task, skill in start_in_groups(model, kind, rows).items():
        weights_NHK = model.weights_of(task)
        assert (weights_NHK[..., skill] == 1).all()
        assert (weights_NHK.sum(-1) == 1).all()


def test_with_as_many_skills_as_tasks_each_has_one_and_no_gradient_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "gradients", None)
    monkeypatch.setattr(groups, "MOST_TASKS", 5)
    model, kind, rows = fresh(llama, num_skills=9, shared_skill=True)
    skills = start_in_groups(model, kind, rows)
    assert skills == {task: place for place, task in enumerate(TASKS)}
    for task, skill in skills.items():
        weights_NHK = model.weights_of(task)
        assert (weights_NHK[..., [skill, 8]] > 0.45).all()
        assert (weights_NHK.sum(-1) - weights_NHK[..., [skill, 8]].sum(-1) < 0.02).all()


@pytest.mark.parametrize("make", [bert, llama])
def test_groups_are_those_of_the_alignment_of_gradients(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kind, rows = fresh(make)
    sketches: list[Any] = []
    monkeypatch.setattr(groups, "balanced_groups", lambda x, *_: sketches.append(x) or [0] * 8)
    start_in_groups(model, kind, rows)
    [found_TS] = sketches
    by_task = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    cosines = alignment(model, kind, by_task).effective.nansum(0) / len(model.sites)
    places = list(zip(*[(i, j) for i in range(8) for j in range(i + 1, 8)], strict=True))
    products_TT = torch.tensor(found_TS @ found_TS.T) / len(model.sites)
    torch.testing.assert_close(products_TT[places[0], places[1]], cosines, atol=0.04, rtol=0)
    assert cosines.std() > 0.04


def test_of_many_tasks_some_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST_TASKS", 5)
    model, kind, rows = fresh(llama)
    skills = start_in_groups(model, kind, rows)
    assert len(skills) == 5
    others = [task for task in TASKS if task not in skills]
    assert all((model.routes[task].abs() < 0.01).all() for task in others)


def test_what_cannot_start_in_groups_is_refused_and_left_as_it_was() -> None:
    model, kind, rows = fresh(llama, num_skills=9)
    with pytest.raises(InputError, match="8 tasks cannot start in groups on 9 skills"):
        start_in_groups(model, kind, rows)
    model, kind, rows = fresh(llama)
    others = [{**row, "task": "other"} for row in rows.select(range(3))]
    with pytest.raises(InputError, match="other"):
        start_in_groups(model, kind, datasets.Dataset.from_list([*rows, *others]))
    assert (model.routes["task 1"].abs() < 0.01).all()
    shared, kind, rows = fresh(llama, method="shared", num_skills=None, num_heads=None)
    with pytest.raises(InputError, match="mhr or poly"):
        start_in_groups(shared, kind, rows)
    model, kind, rows = fresh(llama)
    stack = model.inventory.stacks[-1]
    model.inventory.get_parameter(f"lora_b.{stack.key}").data.fill_(0.1)
    with pytest.raises(InputError, match="only a fresh inventory"):
        start_in_groups(model, kind, rows)


def test_a_run_of_the_program_starts_in_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_suite(tmp_path / "suite")
    write_base(tmp_path / "base")
    arguments = train_arguments(tmp_path, "run", "--lr", "1e-9", "--route-lr", "1e-9")

    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            main([*arguments, "--group-tasks", "2", *options])
        return capsys.readouterr().err

    assert "trains no routes" in refused("--phase", "mu")
    assert "leave one out" in refused("--route-spread", "3")
    shared = ["train", *arguments[1:5], "--out", str(tmp_path / "other"), "--group-tasks", "2"]
    with pytest.raises(SystemExit):
        main([*shared, "--method", "shared"])
    assert "choose mhr or poly" in capsys.readouterr().err
    assert "3 tasks cannot start in groups on 4 skills" in refused("--skills", "4")
    assert not (tmp_path / "run").exists()
    main([*arguments, "--group-tasks", "2", "--skills", "2"])
    model = pr.from_pretrained(pr.load_base(str(tmp_path / "base"))[0], tmp_path / "run")
    for task in ("back", "copy", "upper"):
        torch.testing.assert_close(
            model.routes[task].abs(), torch.full(model.routes.shape, LOGIT), atol=1e-3, rtol=0
        )
    assert read_run(tmp_path / "run")["config"]["group_tasks"] == 2
    with pytest.raises(SystemExit):
        main(["train", "--start", str(tmp_path / "run"), *shared[3:]])
    assert "leave it out with --start" in capsys.readouterr().err
