import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TASKS, relative_error, routed, stack
from torch import Tensor

from polyroute import InputError, MHRConfig
from polyroute.routes.table import RoutingTable
from polyroute.routes.weights import anneal, skill_weights, uniform_weights

VARIANTS: list[dict[str, Any]] = [
    {},
    {"gate": "relaxed_bernoulli"},
    {"gate": "straight_through"},
    {"logit_dropout": 0.4},
    {"shared_skill": True},
    {"normalization": "l2"},
    {"normalization": "average_correction"},
    {"gate": "straight_through", "logit_dropout": 0.4, "shared_skill": True},
    {"gate": "relaxed_bernoulli", "shared_skill": True, "normalization": "average_correction"},
]
SHAPE = (3, 2, 4, 5)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed)) * 2


def config(**values: Any) -> MHRConfig:
    return MHRConfig(num_heads=4, num_skills=5, **values)


@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.1, 8), st.integers(0, 9))
def test_weights_are_the_normalised_sigmoids(
    heads: int, skills: int, spread: float, seed: int
) -> None:
    z = logits(heads, skills, seed=seed) * spread
    expected = reference.weights(z.double())
    actual = skill_weights(z[None, None], config(), training=True)[0, 0]
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-7)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_weights_are_a_distribution_for_any_finite_logits(low: float, high: float) -> None:
    z = torch.tensor([low, high, 0.5 * (low + high), 0.0]).view(1, 1, 1, 4)
    w = skill_weights(z, config(), training=False)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(1, 1, 1))


def test_equal_logits_give_the_uniform_mixture_however_negative_they_are() -> None:
    for value in (-1000.0, -30.0, 0.0, 30.0):
        z = torch.full(SHAPE, value)
        torch.testing.assert_close(skill_weights(z, config(), training=False), uniform_weights(z))


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_evaluation_is_deterministic(values: dict[str, Any]) -> None:
    first = skill_weights(logits(), config(**values), training=False)
    assert torch.equal(first, skill_weights(logits(), config(**values), training=False))


@pytest.mark.parametrize(
    ("noise", "plain"),
    [({"gate": "relaxed_bernoulli"}, {}), ({"logit_dropout": 0.4}, {})],
    ids=["relaxed_bernoulli", "logit_dropout"],
)
def test_noise_is_inactive_in_evaluation(noise: dict[str, Any], plain: dict[str, Any]) -> None:
    actual = skill_weights(logits(), config(**noise), training=False)
    torch.testing.assert_close(actual, skill_weights(logits(), config(**plain), training=False))
    assert not torch.equal(actual, skill_weights(logits(), config(**noise), training=True))


def test_the_defaults_have_no_noise() -> None:
    assert not MHRConfig().noisy_in_training
    plain = [skill_weights(logits(), MHRConfig(), training=t) for t in (True, False)]
    assert torch.equal(*plain)


def test_the_order_is_gate_dropout_shared_skill_normaliser() -> None:
    chosen = config(gate="relaxed_bernoulli", logit_dropout=0.3, shared_skill=True)
    torch.manual_seed(7)
    actual = skill_weights(logits(), chosen, training=True)
    torch.manual_seed(7)
    u = torch.rand(SHAPE).clamp(1e-12, 1 - 1e-7)
    gates = torch.sigmoid(logits() + torch.log(u) - torch.log1p(-u))
    gates = torch.nn.functional.dropout(gates, 0.3, True)
    gates[..., -1] = 1
    torch.testing.assert_close(actual, gates / gates.sum(-1, keepdim=True))


def test_dropped_gates_are_zero_and_the_others_are_scaled_up() -> None:
    torch.manual_seed(0)
    chosen = config(logit_dropout=0.5, normalization="average_correction")
    z = logits(200, 1, 4, 5)
    w = skill_weights(z, chosen, training=True)
    full = torch.sigmoid(z) * math.sqrt(4 / 5) / 0.5
    torch.testing.assert_close(w, torch.where(w == 0, 0, full))
    assert 0.45 < (w == 0).float().mean() < 0.55


def test_l2_divides_the_logits_by_their_norm_without_a_gate() -> None:
    actual = skill_weights(logits(), config(normalization="l2"), training=True)
    torch.testing.assert_close(actual, logits() / logits().square().sum(-1, keepdim=True).sqrt())
    assert (actual < 0).any()


def test_average_correction_multiplies_gates_by_the_root_of_heads_over_skills() -> None:
    actual = skill_weights(logits(), config(normalization="average_correction"), training=True)
    torch.testing.assert_close(actual, torch.sigmoid(logits()) * math.sqrt(4 / 5))


def test_straight_through_rounds_forward_and_passes_the_gradient_of_the_sigmoid() -> None:
    z = logits().requires_grad_()
    chosen = config(gate="straight_through", normalization="average_correction")
    w = skill_weights(z, chosen, training=False) / math.sqrt(4 / 5)
    torch.testing.assert_close(w, (z > 0).float(), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(w.sum(), z)
    p = torch.sigmoid(z.detach())
    torch.testing.assert_close(gradient, p * (1 - p))


def test_all_zero_gates_give_zero_weights_and_finite_gradients() -> None:
    z = torch.full(SHAPE, -5.0, requires_grad=True)
    w = skill_weights(z, config(gate="straight_through"), training=True)
    assert torch.equal(w, torch.zeros(SHAPE))
    assert torch.isfinite(torch.autograd.grad(w.sum(), z)[0]).all()


def test_the_shared_skill_is_always_on_and_gets_no_gradient() -> None:
    z = logits().requires_grad_()
    w = skill_weights(z, config(shared_skill=True), training=True)
    gates = torch.sigmoid(logits())
    gates[..., -1] = 1
    torch.testing.assert_close(w, gates / gates.sum(-1, keepdim=True))
    (gradient,) = torch.autograd.grad(w[..., 0].sum(), z)
    assert torch.equal(gradient[..., -1], torch.zeros(SHAPE[:-1]))
    assert (gradient[..., 0] != 0).all()


@pytest.mark.parametrize(("z", "mean"), [(1.0, 0.661), (2.0, 0.794)])
def test_the_mean_of_relaxed_bernoulli_gates_is_not_the_sigmoid(z: float, mean: float) -> None:
    torch.manual_seed(0)
    chosen = MHRConfig(num_skills=1, num_heads=1, gate="relaxed_bernoulli",
                       normalization="average_correction")  # fmt: skip
    gates = skill_weights(torch.full((200_000, 1, 1, 1), z), chosen, training=True)
    assert reference.gate_mean(z) == pytest.approx(mean, abs=5e-4)
    assert float(gates.mean()) == pytest.approx(mean, abs=2e-3)
    assert float(skill_weights(torch.tensor(z).view(1, 1, 1, 1), chosen, training=False)) == (
        pytest.approx(1 / (1 + math.exp(-z)), abs=1e-6)
    )


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_annealing_follows_the_cosine_to_the_uniform_mixture(progress: float) -> None:
    w = skill_weights(logits(), config(), training=True)
    a = math.cos(math.pi / 2 * progress)
    torch.testing.assert_close(anneal(w, progress), a * w + (1 - a) / 5)
    if progress == 1:
        torch.testing.assert_close(anneal(w, progress), uniform_weights(w))


def test_an_annealed_model_is_its_average_at_the_end_and_itself_at_the_start() -> None:
    model = routed(stack(), num_heads=4)
    learned = model.weights_of("birch")
    model.mixer.anneal_progress = 1.0
    torch.testing.assert_close(model.weights_of("birch"), model.weights_of("mu"))
    model.mixer.anneal_progress = 0.0
    assert torch.equal(model.weights_of("birch"), learned)


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_a_model_uses_the_weights_of_its_variant(values: dict[str, Any]) -> None:
    model = routed(stack(), num_heads=4, **values)
    z = model.routes["cedar"]
    expected = skill_weights(z[None], model.adapter_config, training=False)[0]
    torch.testing.assert_close(model.weights_of("cedar"), expected)
    a = model.factors_of("cedar")[0].a
    skills = model.inventory.site_tensors(0)["lora_a"].double()
    mixed = reference.mix(skills, expected[0].double(), axis=0).t()
    assert relative_error(a, mixed) < 1e-6


@pytest.mark.parametrize("normalization", ["sum", "average_correction", "l2"])
def test_one_skill_is_weighted_by_the_formula_too(normalization: str) -> None:
    model = routed(stack(), num_skills=1, num_heads=4, normalization=normalization)
    z = model.routes["dune"]
    expected = {"sum": torch.ones_like(z), "average_correction": torch.sigmoid(z) * 2,
                "l2": torch.sign(z)}[normalization]  # fmt: skip
    torch.testing.assert_close(model.weights_of("dune"), expected)


def test_fresh_logits_are_within_a_thousandth_and_fill_that_range() -> None:
    table = RoutingTable(TASKS, (50, 8, 8)).logits
    assert table is not None
    assert 0.99e-3 < float(table.detach().abs().max()) <= 1e-3
    assert abs(float(table.detach().mean())) < 5e-5


def test_adding_a_task_leaves_the_other_rows_as_they_are() -> None:
    routes = RoutingTable(TASKS, (2, 2, 3))
    before = routes.logits
    assert before is not None
    copied = before.detach().clone()
    assert routes.add(["elm"]) == [4]
    assert routes.logits is not None
    assert torch.equal(routes.logits[:4], copied)
    assert 0 < float(routes.logits[4].detach().abs().max()) <= 1e-3


def test_rows_are_read_and_written_by_name_or_number() -> None:
    routes = RoutingTable(TASKS, (2, 2, 3))
    values = logits(2, 2, 3)
    routes["cedar"] = values
    assert torch.equal(routes[2], values)
    routes[0] = values.flatten()
    assert torch.equal(routes["amber"], values)
    assert torch.equal(routes["mu"], torch.zeros(2, 2, 3))


def test_a_row_of_the_wrong_shape_is_refused() -> None:
    routes = RoutingTable(TASKS, (2, 2, 3))
    with pytest.raises(InputError, match=r"shape \[2, 2, 3\].*not \[3, 2, 2\]"):
        routes["amber"] = logits(3, 2, 2)
    with pytest.raises(InputError, match="uniform mixture"):
        routes["mu"] = logits(2, 2, 3)


@pytest.mark.parametrize("names", [["amber", "amber"], ["mu"], [0], ["oak"], ["amber", ""]])
def test_keeping_impossible_tasks_changes_nothing(names: list[str]) -> None:
    routes = RoutingTable(TASKS, (2, 2, 3))
    before = routes.logits
    with pytest.raises(InputError):
        routes.keep(names)
    assert routes.names == TASKS
    assert routes.logits is before


def test_kept_tasks_take_their_rows_along() -> None:
    routes = RoutingTable(TASKS, (2, 2, 3))
    expected = [routes["dune"], routes["birch"]]
    assert routes.keep(["dune", "birch"]) == [3, 1]
    assert routes.names == ("dune", "birch")
    assert all(torch.equal(routes[i], row) for i, row in enumerate(expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lora"}, "'lora' is not one of 'mhr', 'poly'"),
        ({"method": "poly", "num_heads": 4}, "one head, not 4"),
        ({"method": "shared", "num_skills": 3}, "one skill, not 3"),
        ({"method": "private", "num_skills": 3}, "one skill per task"),
        ({"num_skills": 0}, "num_skills must be a positive"),
        ({"rank": 0}, "rank must be a positive"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be a finite number, not nan"),
        ({"alpha": float("inf")}, "alpha must be a finite number, not inf"),
        ({"alpha": "x"}, "alpha must be a finite number, not 'x'"),
        ({"rank": "4"}, "rank must be a positive whole number, not '4'"),
        ({"num_heads": True}, "num_heads must be a positive whole number, not True"),
        ({"shared_skill": 1}, "shared_skill must be True or False"),
        ({"target_modules": None}, "target_modules must be a regular expression or a list"),
        ({"target_modules": [1]}, r"target_modules must be .*not \[1\]"),
        ({"exclude_modules": 5}, "exclude_modules must be a regular expression or a list"),
        ({"dropout": "x"}, "dropout must be a finite number, not 'x'"),
        ({"dropout": float("nan")}, "dropout must be a finite number"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"logit_dropout": -0.1}, "logit_dropout must be in"),
        ({"anneal_steps": -1}, "anneal_steps must not be negative"),
        ({"granularity": "layer"}, "'layer' is not one of 'finegrained'"),
        ({"normalization": "l2", "shared_skill": True}, "at their defaults"),
        ({"normalization": "l2", "gate": "straight_through"}, "at their defaults"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        MHRConfig(**values)


def test_a_config_key_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'num_head' does not exist: did you mean 'num_heads'"):
        MHRConfig.from_dict({"num_head": 4})


@pytest.mark.parametrize("method", ["mhr", "poly", "shared", "private"])
def test_a_config_survives_its_dictionary(method: Any) -> None:
    chosen = MHRConfig(method=method, rank=2, target_modules=["q", "v"], exclude_modules="x.*")
    assert MHRConfig.from_dict(chosen.to_dict()) == chosen


def test_without_normalization_the_logits_are_the_weights() -> None:
    given = logits()
    assert torch.equal(skill_weights(given, config(normalization="none"), training=True), given)
    for setting in ({"gate": "straight_through"}, {"shared_skill": True}, {"logit_dropout": 0.1}):
        with pytest.raises(InputError, match="normalization='none' uses the logits themselves"):
            config(normalization="none", **setting)
