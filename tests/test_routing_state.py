"""How far apart routes and skills are: against loops in float64, in a training's log, in words."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import EXAMPLES, made, t5
from datasets import Dataset
from models import routed

from polyroute.study.routing_state import COSINE, ENTROPY, in_words, routing_state
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

TASKS = ("where", "truth", "count")


def apart(**settings: Any) -> Any:
    """A model whose skills and routes are random."""
    model = routed(made(t5)[0].base_model, TASKS, **settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.inventory.parameters():
            parameter.normal_()
        if model.routes.logits is not None:
            model.routes.logits.normal_(std=2)
    return model


@pytest.mark.parametrize("settings", [
    {"num_heads": 4}, {"method": "poly"}, {"adapter": "ia3", "num_heads": 4},
    {"num_heads": 4, "granularity": "blockwise"}, {"num_heads": 4, "combine": "output"},
])  # fmt: skip
def test_it_equals_loops_in_float64(settings: dict[str, Any]) -> None:
    model = apart(**settings)
    is_ia3 = model.inventory.adapter == "ia3"
    skills = []
    for skill in range(model.inventory.num_skills):
        parts = []
        for site in range(len(model.sites)):
            tensors = model.inventory.site_tensors(site)
            found = tensors["ia3"] - 1 if is_ia3 else tensors["lora_b"]
            parts.append(found.detach()[:, skill].double().flatten())
        skills.append(torch.cat(parts))
    pairs = [
        float(one @ other / one.norm() / other.norm())
        for one, other in itertools.combinations(skills, 2)
    ]
    entropies = []
    for task in TASKS:
        for mixture in model.weights_of(task).double().flatten(0, 1).tolist():
            entropy = -sum(w * math.log(w) for w in mixture if w > 0)
            entropies.append(entropy / math.log(len(mixture)))
    state = routing_state(model)
    assert state[COSINE] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    assert state[ENTROPY] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)


def test_what_has_no_routes_has_no_state_and_new_skills_no_cosine() -> None:
    for method in ("shared", "private"):
        assert routing_state(apart(method=method)) == {}
    collapsed = apart(num_heads=4)
    collapsed.set_phase("mu")
    assert routing_state(collapsed) == {}
    for adapter in ("lora", "ia3"):
        fresh = routed(made(t5)[0].base_model, TASKS, adapter=adapter, num_heads=4)
        with torch.no_grad():
            for name, parameter in fresh.inventory.named_parameters():
                if not name.startswith("lora_a"):
                    parameter.fill_(float(adapter == "ia3"))
        assert routing_state(fresh).keys() == {ENTROPY}


def test_a_training_logs_it_beside_each_loss_and_is_not_changed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs, ends = [], []
    for measured in (True, False):
        wrapper, kind = made(t5)
        model = routed(wrapper.base_model, TASKS, num_heads=4)
        rows = Dataset.from_dict(kind.encode(EXAMPLES), features=kind.features).sort("task")
        args = MultiTaskTrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=2,
            report_to=[], use_cpu=True,
        )  # fmt: skip
        if not measured:
            monkeypatch.setattr("polyroute.trainer.routing_state", lambda _: {})
        trainer = MultiTaskTrainer(model, kind, args, rows)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        ends.append(torch.cat([p.detach().flatten() for p in model.learned()]))
    assert [{ENTROPY, COSINE} <= entry.keys() for entry in logs[0]] == [True, True]
    assert logs[0][-1][ENTROPY] == routing_state(model)[ENTROPY]
    assert torch.equal(*ends)


def test_in_words() -> None:
    def found(**state: float | None) -> str | None:
        return in_words([{"step": 1, "loss": 2.0, ENTROPY: 1.0}, {"step": 2, **state}, {"end": 3}])

    assert in_words([]) is None
    assert in_words([{"step": 1, "loss": 2.0}]) is None
    assert found(route_entropy=0.9, skill_cosine=0.5) is None
    assert found(route_entropy=0.9, skill_cosine=None) is None  # it was not finite
    one_lora = "this inventory is one adapter so far, because "
    alike, uniform = "its skills are alike (cosine 0.95)", "its routes are uniform (entropy 0.99 of"
    for state, why in (
        ({ENTROPY: 0.9, COSINE: 0.95}, alike),
        ({ENTROPY: 0.99, COSINE: 0.2}, uniform),
        ({ENTROPY: 0.99, COSINE: 0.95}, f"{uniform} that of a uniform mixture) and {alike}"),
    ):
        assert (found(**state) or "").startswith(one_lora + why)
