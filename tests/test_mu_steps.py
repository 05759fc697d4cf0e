"""Phase `mu` under Adafactor moves the one average as the published code moves its K copies.

The published code trains all copies under uniform weights. The slow reference here does the same
with transformers' own Adafactor, and averages at the end.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import TASKS, llama, routed, t5
from test_adapt import examples, trained
from test_optimizers import published
from torch import Tensor, nn
from transformers import Adafactor, AutoModelForSeq2SeqLM

from polyroute import InputError, RoutedModel, adapt_many, from_pretrained
from polyroute.adapting.slots import Slots
from polyroute.optimizers import LayerAdafactor
from polyroute.program.cli.app import main

SKILLS = 8
RATES: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0}


def skills_of(model: RoutedModel) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.startswith("inventory")}


def average(skills: Tensor) -> Tensor:
    """`[n, H, K, r, D]` to `[n, 1, 1, r, H D]`."""
    n, heads, _, rank, width = skills.shape
    return skills.mean(2).permute(0, 2, 1, 3).reshape(n, 1, 1, rank, heads * width)


def moved(factor: str, after: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """The root mean square of what a factor moved by, over all layers."""
    parts = [(after[n] - before[n]).flatten() for n in before if factor in n]
    return float(torch.cat(parts).square().mean().sqrt())


def both(
    base: Any, config: dict[str, Any], rates: dict[str, Any], scale_parameter: bool = True
) -> dict[str, dict[str, Tensor]]:
    """The average at the start, and after 20 equal steps by each way and by that of one LoRA."""
    ours, copies, lora = (
        routed(base(), TASKS, num_skills=SKILLS, **config) for _ in range(3)
    )  # fmt: skip
    for model in (ours, copies, lora):
        model.inventory.double()
        model.set_phase("mu" if model is not copies else "mu-uncollapsed")
    found = {"start": {n: p.detach().clone() for n, p in skills_of(ours).items()}}
    separate = [
        nn.Parameter(t.detach().clone()) for t in published(copies, skills_of(copies))["skills"]
    ]
    settings: dict[str, Any] = {"scale_parameter": scale_parameter}
    theirs = Adafactor(separate, relative_step=False, **rates, **settings)
    small = lora.param_groups(None, **rates)
    for group in small:
        group.pop("spread")
    one_lora = LayerAdafactor(small, lora, **settings)
    optimizer = LayerAdafactor(ours.param_groups(None, **rates), ours, **settings)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for name, p in skills_of(ours).items():
            size = torch.rand(len(p), 1, 1, 1, p.shape[-1], generator=generator) ** 4 + 0.01
            gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype) * size
            p.grad = gradient
            skills_of(lora)[name].grad = gradient.clone()
            copy = skills_of(copies)[name]
            n, heads, _, rank, width = copy.shape
            shared = gradient.view(n, 1, rank, heads, width).permute(0, 3, 1, 2, 4) / SKILLS
            copy.grad = shared.expand_as(copy).clone()
        gradients = {n: p.grad for n, p in skills_of(copies).items()}
        for p, gradient in zip(separate, published(copies, gradients)["skills"], strict=True):
            p.grad = gradient.clone()
        if step == 10:  # as a run that is resumed
            state, fresh = optimizer.state_dict(), ours.param_groups(None, **rates)
            optimizer = LayerAdafactor(fresh, ours, **settings)
            optimizer.load_state_dict(state)
        for each in (optimizer, theirs, one_lora):
            each.step()
    with torch.no_grad():
        for cut, p in zip(
            published(copies, skills_of(copies))["skills"], separate, strict=True
        ):  # fmt: skip
            cut.copy_(p)
    found["ours"] = {n: p.detach() for n, p in skills_of(ours).items()}
    found["theirs"] = {n: average(p.detach()) for n, p in skills_of(copies).items()}
    found["one LoRA"] = {n: p.detach() for n, p in skills_of(lora).items()}
    return found


@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(
    ("base", "config"),
    [
        (t5, {"num_heads": 4, "rank": 1}),
        (t5, {"num_heads": 1, "rank": 2}),
        (llama, {"num_heads": 4, "rank": 3}),
        (llama, {"num_heads": 4, "adapter": "ia3"}),
    ],
)
def test_the_average_moves_as_the_copies_do(
    base: Any, config: dict[str, Any], decay: float, scale_parameter: bool
) -> None:
    rates = {"lr": 1e-2, "weight_decay": decay}
    found = both(base, config, rates, scale_parameter)
    # float64: what is left is rounding, and the 1e-30 that Adafactor adds to squares.
    torch.testing.assert_close(found["ours"], found["theirs"], rtol=1e-9, atol=1e-12)


def test_as_one_lora_a_would_move_sqrt_k_times_less() -> None:
    found = both(t5, {"num_heads": 4, "rank": 1}, RATES)
    steps = {
        way: moved("lora_a", found[way], found["start"]) for way in ("ours", "theirs", "one LoRA")
    }
    assert steps["ours"] == pytest.approx(steps["theirs"], rel=1e-9)
    # 1/sqrt(8) = 0.35 at first; both grow a little in 20 steps.
    assert steps["one LoRA"] / steps["theirs"] == pytest.approx(0.36, abs=0.02)


def test_where_nothing_is_averaged_steps_are_as_before() -> None:
    for config in ({"method": "shared"}, {"num_heads": 2, "combine": "output"}):
        model = routed(t5(), TASKS, **config)
        for phase in ("mu", "mu"):
            assert "spread" not in model.param_groups(phase, **RATES)[0]
    model = routed(t5(), TASKS, num_heads=2)
    for phase, is_averaged in (("z", False), ("mu", True), ("mu", True), ("full", False)):
        assert ("spread" in model.param_groups(phase, **RATES)[0]) == is_averaged


def test_steps_that_an_older_version_began_are_not_continued() -> None:
    model = routed(t5(), TASKS, num_heads=2)
    groups = model.param_groups("mu", **RATES)
    optimizer = LayerAdafactor(groups, model)
    for p in groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for state in optimizer.state.values():
        del state["spread"]
    with pytest.raises(InputError, match=r"took shorter ones under Adafactor: start again"):
        optimizer.step()


# ------------------------------------------------------------- slots, and the command line


def adapted(phase: Any, **settings: Any) -> list[Any]:
    model, kind = trained(dtype=torch.float64)
    results = adapt_many(
        model, {"new": examples("new")}, kind=kind, phase=phase, optimizer="adafactor", steps=20,
        lr=1e-2, **{"max_grad_norm": 1e6, **settings},
    )  # fmt: skip
    return list(results[0].factors)


def test_a_slot_in_phase_mu_ends_where_its_copies_would() -> None:
    for one, other in zip(adapted("mu"), adapted("mu-uncollapsed"), strict=True):
        # The loss is that of a real model in float64; 20 steps enlarge its rounding.
        torch.testing.assert_close(one.a, other.a, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.b, other.b, rtol=1e-6, atol=1e-9)


def test_a_slot_that_starts_at_one_task_is_no_larger_than_its_mixture_says() -> None:
    model, _ = trained()
    sharp = torch.full_like(model.routes["first"], -30.0)
    sharp[..., 1] = 30.0
    with Slots(model, "mu", 2) as slots:
        slots.start(0, seed=0, init=sharp)
        slots.start(1, seed=0)
        alone, mean = (slots.averages(place)["spread"] for place in (0, 1))
        assert all(bool((one < 1e-6).all()) for one in alone)  # one skill: nothing is averaged
        assert all(bool((one > 1e-3).all()) for one in mean)


def test_training_that_goes_on_in_phase_mu_ends_where_the_copies_would(
    run: Path, place: Path
) -> None:
    for phase in ("mu", "mu-uncollapsed"):
        main([
            "train", "--start", str(run), "--data", str(place / "suite"), "--phase", phase,
            "--steps", "6", "--batch-size", "8", "--lr", "1e-2", "--optimizer", "adafactor",
            "--max-grad-norm", "1e6", "--out", str(place / phase),
        ])  # fmt: skip
    before, one, other = (
        from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(place / "base"), folder)
        for folder in (run, place / "mu", place / "mu-uncollapsed")
    )
    sites = [model.factors_of("mu") for model in (before, one, other)]
    for start, mine, theirs in zip(*sites, strict=True):
        # Single precision, and Adafactor divides by gradients that are nearly zero.
        torch.testing.assert_close(mine.a, theirs.a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.b, theirs.b, rtol=1e-3, atol=1e-5)
        assert (mine.a - start.a).abs().max() > 1e-3
