"""Skills of the study on a language model start apart as they are said to."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import lm_starts  # noqa: E402
import paper_studies  # noqa: E402

import polyroute as pr  # noqa: E402


def test_groups_are_those_of_like_vectors_and_of_equal_size() -> None:
    random = np.random.default_rng(0)
    planted = np.arange(22) % 4
    vectors = random.normal(size=(4, 20))[planted] + 0.3 * random.normal(size=(22, 20)) + 5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = np.array(lm_starts.balanced_groups(lm_starts.centred(vectors @ vectors.T), 4))
    assert sorted(np.bincount(found)) == [5, 5, 6, 6]
    same = planted[:, None] == planted
    assert ((found[:, None] == found) == same).all()


def test_a_grouped_start_gives_every_skill_its_share_of_tasks(tmp_path: Path) -> None:
    study = paper_studies.generated(tmp_path / "work", tmp_path / "results")
    study = replace(study, train=study.train[:8])
    base, kind = study.base_and_kind()
    model = pr.attach(base, pr.MHRConfig(num_skills=4, num_heads=2, rank=1), study.train)
    lm_starts.grouped(study, model, kind)
    skills = []
    for task in study.train:
        logits_HK = model.routes[task].flatten(0, 1)
        assert (logits_HK.abs() == lm_starts.LOGIT).all()
        [skill] = set(logits_HK.argmax(-1).tolist())
        assert ((logits_HK > 0).sum(-1) == 1).all()
        skills.append(skill)
    assert np.bincount(skills).tolist() == [2, 2, 2, 2]
    a_nHKrD = model.inventory.get_parameter(f"lora_a.{model.inventory.stacks[0].key}")
    assert torch.equal(a_nHKrD[:, :, 0], a_nHKrD[:, :, 3])
    assert a_nHKrD.std() > 0
