"""Routes without training: what they choose, against slow references and PEFT's Arrow."""

import pickle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from models import batch, llama, relative_error, routed, t5
from test_delta import deltas
from torch import Tensor, nn
from unlike_loras import write_unlike

import polyroute as pr
from polyroute.layer.factors import LoRAFactors
from polyroute.library.token_routes import TokenRoute

peft = pytest.importorskip("peft")

EQUAL = ("one", "two", "three", "four", "five")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five LoRAs of the same layers and ranks, and three that differ."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(EQUAL):
        torch.manual_seed(seed)
        written_with(folder / "equal" / name, seed)
    write_unlike(folder / "ragged")
    return folder


def written_with(folder: Path, seed: int) -> None:
    """A LoRA whose updates have a leading direction, on which power iterations converge."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            drawn[:1] *= 4 if "lora_A" in name else 1
            parameter.data.copy_(drawn)
    model.save_pretrained(folder)


@torch.no_grad()
def logits(model: nn.Module, rule: pr.RouteRule, **inputs: Any) -> Tensor:
    with model.route(rule):
        found: Tensor = model(**(inputs or batch(llama()))).logits
    return found


def attached(loras: Path, kind: str) -> pr.RoutedModel:
    return pr.attach(llama(), pr.Library.from_peft(loras / kind)).eval()


@torch.no_grad()
def test_arrow_is_that_of_peft_where_that_is_exact(loras: Path) -> None:
    from peft.tuners.lora.arrow import create_arrow_model

    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=0)
    paths = [str(loras / "equal" / name) for name in EQUAL]
    theirs = create_arrow_model(llama(), paths, config).eval()
    expected = theirs(**batch(llama())).logits
    ours = attached(loras, "equal")
    found = logits(ours, pr.Arrow(top_k=2, temperature=0.7))
    assert relative_error(found, expected) < 1e-3
    assert relative_error(found, logits(ours, pr.Arrow(top_k=2, temperature=70))) > 1e-2


def updates(model: pr.RoutedModel, site: int) -> dict[int, Tensor]:
    library = {name: model.factors_of(name)[site] for name in model.tasks}
    found = {}
    for skill, own in enumerate(library.values()):
        assert isinstance(own, LoRAFactors)
        if len(own.a):
            found[skill] = (own.b.double().t() @ own.a.double()).detach()
    return found


def slowly(rule: TokenRoute, model: pr.RoutedModel, site: int, x: Tensor) -> Tensor:
    """What a rule adds in one layer, from dense updates, token by token."""
    every = updates(model, site)
    found = torch.zeros(*x.shape[:-1], model.sites[site].d_out).double()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
        own = x[tuple(place)].double()
        scores = {}
        for skill, dense in every.items():
            _, s, v = torch.linalg.svd(dense, full_matrices=False)
            v = v[s > 1e-6 * s[0]]
            arrow = float((own @ v[0]).abs())
            spectr = float((own @ v.t()).norm()) / len(v) ** 0.5
            if isinstance(rule, pr.Arrow):
                scores[skill] = arrow
            elif isinstance(rule, pr.SpectR):
                scores[skill] = float((dense @ own).norm()) if rule.weighted else spectr
            else:
                scores[skill] = arrow, spectr  # type: ignore[assignment]
        if isinstance(rule, pr.LAG):
            first = sorted(scores, key=lambda k: -scores[k][0])[: rule.proposed]  # type: ignore[index]
            scores = {k: scores[k][1] for k in first}  # type: ignore[index]
        best = sorted(scores, key=lambda k: -scores[k])[: rule.top_k]
        weights = torch.full((len(best),), 1 / len(best)).double()
        if isinstance(rule, pr.Arrow):
            values = torch.tensor([scores[k] for k in best]).double()
            weights = torch.softmax(values / rule.temperature, 0)
        for weight, skill in zip(weights, best, strict=True):
            found[tuple(place)] += weight * (every[skill] @ own)
    return found


RULES = [
    pr.Arrow(), pr.Arrow(top_k=1), pr.Arrow(top_k=2, temperature=0.3), pr.SpectR(top_k=2),
    pr.SpectR(), pr.SpectR(top_k=1, weighted=True), pr.LAG(), pr.LAG(top_k=2, proposed=2),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.name}-{r.settings()}")
@pytest.mark.parametrize("kind", ["equal", "ragged"])
def test_a_rule_adds_what_its_equation_says(loras: Path, kind: str, rule: TokenRoute) -> None:
    model = attached(loras, kind)
    for site in (0, len(model.sites) - 1):
        layer = model.sites[site].layer
        x = torch.randn(2, 3, model.sites[site].d_in)
        with model.route(rule):
            factors = model.mixer.mixture(
                model.open_routes.now().value,
                training=False,
                mask=None,  # type: ignore[union-attr]
            ).factors[site]
            found = factors.apply(layer, x, 0.0) - layer(x)
        assert relative_error(found, slowly(rule, model, site, x).float()) < 1e-4


def test_lag_that_proposes_all_is_spectr(loras: Path) -> None:
    model = attached(loras, "ragged")
    both = [logits(model, rule) for rule in (pr.LAG(top_k=2, proposed=3), pr.SpectR(top_k=2))]
    assert relative_error(*both) < 1e-6


@given(st.lists(deltas(), min_size=2, max_size=4))
def test_scores_do_not_depend_on_how_a_skill_is_factored(library: list[pr.Delta]) -> None:
    x = torch.randn(5, 7)
    skills = {i: d.layers["up"] for i, d in enumerate(library) if "up" in d.layers}
    turned = {}
    for skill, own in skills.items():
        m = torch.linalg.qr(torch.randn(len(own.a), len(own.a)).double()).Q * 3
        a, b = m @ own.a.double(), torch.linalg.inv(m).t() @ own.b.double()
        turned[skill] = LoRAFactors(a.float(), b.float())
    if skills:
        for rule in (pr.Arrow(), pr.SpectR(), pr.SpectR(weighted=True)):
            one, other = (rule.scores_of(s, 0)(x) for s in (skills, turned))
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.max()))


def test_prototypes_are_exact_where_values_are_close() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(40, 8).double()).Q for _ in range(2))
    values = torch.tensor([1.02, *[1.0] * 7]).double()
    m = torch.randn(8, 8).double()
    b, a = u * values @ m, torch.linalg.inv(m) @ v.t()
    score = pr.Arrow().scores_of({0: LoRAFactors(a.float(), b.t().float())}, 0)
    assert float(score(v[:, 0].float().unsqueeze(0))) == pytest.approx(1, abs=1e-4)


def test_a_skill_that_adds_nothing_is_never_nan(loras: Path) -> None:
    model = attached(loras, "ragged")
    with torch.no_grad():
        for parameter in model.inventory.lora_b.values():  # type: ignore[operator]
            parameter.zero_()
    base = llama()(**batch(llama())).logits
    for rule in RULES:
        assert relative_error(logits(model, rule), base) < 1e-6


@pytest.mark.parametrize("rule", RULES[3:6], ids=lambda r: f"{r.name}-{r.settings()}")
def test_decoding_padding_and_order_change_nothing(loras: Path, rule: TokenRoute) -> None:
    model = attached(loras, "ragged")
    ids = batch(llama())["input_ids"]
    whole = logits(model, rule, input_ids=ids)
    turned = logits(model, rule, input_ids=ids.flip(0))
    assert relative_error(turned.flip(0), whole) < 1e-5
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = torch.cat([torch.zeros_like(ids[:, :3]), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, rule, input_ids=padded, attention_mask=mask, position_ids=positions)
    assert relative_error(found[:, 3:], whole) < 1e-4
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with model.route(rule):
        cached = model.generate(ids, **options)
        again = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, again)
    assert torch.equal(cached, model.generate(ids, tasks=rule, **options))


def test_scores_follow_the_skills(loras: Path) -> None:
    model, rule = attached(loras, "ragged"), pr.Arrow(top_k=1)
    before = logits(model, rule)
    with torch.no_grad():
        for parameter in model.inventory.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    fresh = logits(model, pr.Arrow(top_k=1))
    assert relative_error(before, fresh) > 1e-3
    assert torch.equal(logits(model, rule), fresh)
    other = attached(loras, "equal")  # one rule may route several models
    assert torch.equal(logits(other, rule), logits(other, pr.Arrow(top_k=1)))


def test_gates_are_recorded_and_gradients_flow(loras: Path) -> None:
    model, rule = attached(loras, "ragged"), pr.Arrow(top_k=2)
    model.set_phase("full")
    with model.route(rule), model.record_gates() as gates:
        model(**batch(llama())).logits.square().mean().backward()
    assert [g.site for g in gates] == list(range(len(model.sites)))
    for site, gate in enumerate(gates):
        assert torch.allclose(gate.weights.sum(-1), torch.ones(()))
        absent = [k for k, rank in enumerate(model.inventory.ranks[site]) if not rank]  # type: ignore[union-attr, index]
        assert not gate.weights[..., absent].any()
    assert any(p.grad is not None and p.grad.any() for p in model.inventory.parameters())


@pytest.mark.parametrize("combine", ["weight", "output"])
def test_skills_that_were_trained_together_can_be_routed_so(combine: str) -> None:
    model = routed(llama(), num_heads=2, num_skills=3, combine=combine).eval()
    with torch.no_grad():
        for parameter in model.inventory.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    assert logits(model, pr.Arrow()).isfinite().all()
    one = routed(llama(), method="poly", num_skills=1, combine=combine).eval()
    with torch.no_grad():
        for parameter in one.inventory.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        expected = one(**batch(llama()), tasks="mu").logits
    assert relative_error(logits(one, pr.SpectR()), expected) < 1e-5


def test_average_activation_finds_the_skill_that_saw_such_inputs(loras: Path) -> None:
    model = attached(loras, "ragged")
    texts = {"plain": [3, 4, 5, 6], "rs": [10, 11, 12, 13], "patterns": [20, 21, 22, 23]}
    batches = {
        task: [{"input_ids": torch.tensor([[*ids, 0, 0]]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0, 0]])}]
        for task, ids in texts.items()
    }  # fmt: skip
    rule = pr.AverageActivation.of(model, batches, top_k=1)
    seen: dict[str, Tensor] = {}
    layer = model.routed_layers[0]
    for task, ids in texts.items():
        hook = layer.register_forward_pre_hook(lambda _, a, t=task: seen.update({t: a[0]}))
        model(torch.tensor([ids]), tasks=task)
        hook.remove()
    for skill, task in enumerate(model.tasks):
        expected = seen[task][0].mean(0)
        assert torch.allclose(rule.keys[0][skill], expected, atol=1e-5)
        scores = rule.scores_of({k: LoRAFactors(expected, expected) for k in range(3)}, 0)
        assert int(scores(expected).argmax()) == skill
    assert logits(model, rule).isfinite().all()
    with pytest.raises(pr.InputError, match="give batches for each LoRA of the library: rs"):
        pr.AverageActivation.of(model, {k: v for k, v in batches.items() if k != "rs"})
    with pytest.raises(pr.InputError, match="'rs' has no batch of tokens"):
        pr.AverageActivation.of(model, {**batches, "rs": []})
    with pytest.raises(pr.InputError, match="are not saved with a model"):
        pr.attach(llama(), pr.MHRConfig(), ["a"], rule=rule)


def test_requests_that_make_no_sense_are_refused(loras: Path) -> None:
    model = attached(loras, "ragged")
    for make, sentence in (
        (lambda: pr.Arrow(top_k=0), "top_k must be a positive whole number"),
        (lambda: pr.Arrow(temperature=0), "temperature must be positive"),
        (lambda: pr.SpectR(weighted="yes"), "weighted must be True or False"),  # type: ignore[arg-type]
        (lambda: pr.LAG(top_k=4, proposed=2), "proposed must be at least top_k=4"),
        (lambda: model.route([pr.Arrow(), "rs"]), "a batch has one rule, or tasks"),
        (lambda: model.route([pr.Arrow(), pr.Arrow()]), "a batch has one rule, or tasks"),
        (lambda: model.route(routed(llama()).rule), "TableRule cannot route a model that it does"),
    ):
        with pytest.raises(pr.InputError, match=sentence):
            make()  # type: ignore[no-untyped-call]
    ia3 = routed(llama(), adapter="ia3").eval()
    with pytest.raises(pr.InputError, match=r"Arrow routes LoRA skills; these are \(IA\)\^3"):
        logits(ia3, pr.Arrow())


def test_rules_are_pickled(loras: Path) -> None:
    model, rule = attached(loras, "ragged"), pr.Arrow(top_k=2, temperature=0.5)
    expected = logits(model, rule)
    again = pickle.loads(pickle.dumps(rule))
    assert torch.equal(logits(model, again), expected)


def test_padding_of_an_encoder_is_not_that_of_the_decoder() -> None:
    """Also where both have the same length."""
    model = pr.attach(t5(), pr.MHRConfig(method="private"), ["a"]).eval()
    for parameter in model.inventory.parameters():
        parameter.data.normal_(std=0.1)
    ids, answer = torch.randint(3, 30, (2, 6)), torch.randint(3, 30, (2, 6))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answer}
    same = pr.AverageActivation.of(model, {"a": [given]})
    more = {**given, "input_ids": torch.cat([ids, ids[:, :3]], 1),
            "attention_mask": torch.cat([mask, torch.zeros_like(mask[:, :3])], 1)}  # fmt: skip
    longer = pr.AverageActivation.of(model, {"a": [more]})
    for one, other in zip(same.keys, longer.keys, strict=True):
        assert relative_error(one, other) < 1e-4
