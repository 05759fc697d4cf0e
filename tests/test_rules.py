"""Two rules written outside of the package train, decode, save and load like those inside."""

import sys
from pathlib import Path
from typing import Any

import base_models
import pytest
import torch
from models import batch, llama, relative_error, rows, shake, t5
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from unsigned import without_digests

from polyroute import InputError, MHRConfig, RoutedModel, adapt_many, attach, from_pretrained
from polyroute.kinds.choose import kind_of
from polyroute.routes.rule import RouteRule

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from condition_rule import ConditionRule
from token_gate import TokenGate, balance_loss

TOLERANCE = 2e-6
CONDITION = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-1.0, 2.0]])
SPACES = ("weight", "output")


def gated(base: nn.Module, combine: str = "output", heads: int = 2, **more: Any) -> RoutedModel:
    config = MHRConfig(num_skills=5, num_heads=heads, rank=2, alpha=7.0, combine=combine, **more)
    torch.manual_seed(4)
    return sharp(shake(attach(base, config, ["a", "b"], rule=TokenGate(top_k=2))))


def conditioned(base: nn.Module, combine: str = "weight", **more: Any) -> RoutedModel:
    config = MHRConfig(num_skills=3, num_heads=2, rank=2, alpha=7.0, combine=combine, **more)
    torch.manual_seed(5)
    return sharp(shake(attach(base, config, ["a"], rule=ConditionRule(width=2))))


@torch.no_grad()
def sharp(model: RoutedModel) -> RoutedModel:
    """Gates that differ strongly from token to token."""
    for parameter in model.rule.parameters():
        parameter.mul_(4)
    return model


MODELS = {"gate": gated, "condition": conditioned}


def inputs(name: str, base: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = dict(batch(base))
    return {**found, "condition": CONDITION} if name == "condition" else found


def by_hand(model: RoutedModel, site: int, x: Tensor, weights: Tensor) -> Tensor:
    """What the skills of a site add to each of the vectors `[N, d_in]`, by loops in float64."""
    tensors = {k: t.detach().double() for k, t in model.inventory.site_tensors(site).items()}
    a, b, scale = tensors["lora_a"], tensors["lora_b"], model.adapter_config.scale
    found = []
    for vector, w in zip(x.double(), weights.double(), strict=True):
        heads, skills = w.shape
        blocks = vector.view(a.shape[0], -1)
        outputs = []
        for h in range(heads):
            block = torch.zeros(b.shape[-1], dtype=torch.float64)
            for k in range(skills):
                if model.adapter_config.combine == "output":
                    z = sum(blocks[g] @ a[g, k] for g in range(a.shape[0]))
                else:
                    mixed = [sum(w[g, j] * a[g, j] for j in range(skills)) for g in range(heads)]
                    z = sum(blocks[g] @ mixed[g] for g in range(heads))
                block += w[h, k] * (z @ b[h, k])
            outputs.append(block)
        found.append(scale * torch.cat(outputs))
    return torch.stack(found)


@pytest.mark.parametrize("combine", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_follows_the_equation_of_its_rule(name: str, combine: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12))
    plain = nn.Linear(8, 12)
    plain.load_state_dict(base[0].state_dict())
    model = MODELS[name](base, combine)
    x = torch.randn(4, 3, 8)
    given = {"condition": CONDITION} if name == "condition" else {}
    flat = x.reshape(-1, 8)
    if name == "gate":
        w = torch.zeros(12, 2, 5)
        scores = (flat @ model.rule.scorers[0].weight.t()).view(12, 2, 5)
        for n in range(12):
            for h in range(2):
                best = sorted(range(5), key=lambda k: -float(scores[n, h, k]))[:2]
                w[n, h, best] = torch.softmax(scores[n, h, best], dim=0)
    else:
        w = torch.softmax(model.rule.network(CONDITION), -1)[:, 0].repeat_interleave(3, 0)
    expected = plain(flat).double() + by_hand(model, 0, flat, w.detach())
    assert relative_error(model(x, **given), expected.view(4, 3, 12)) < TOLERANCE


@pytest.mark.parametrize("combine", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_everything_that_a_rule_learns_gets_a_gradient_and_lowers_the_loss(
    name: str, combine: str
) -> None:
    model = MODELS[name](llama(), combine).train()
    given = inputs(name, model.base_model)
    groups = model.param_groups("full", lr=1e-2)
    assert [group["name"] for group in groups] == ["skills", "rule"]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(15):
        loss = model(**given).loss
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.rule.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("make", [llama, t5])
@pytest.mark.parametrize("name", MODELS)
def test_generation_is_the_same_with_a_cache_and_for_each_prompt_alone(
    name: str, make: Any, num_beams: int
) -> None:
    model = MODELS[name](make())
    given = {k: v for k, v in inputs(name, model.base_model).items() if k != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options["num_beams"] = num_beams
    cached = model.generate(**given, **options)
    assert torch.equal(cached, model.generate(**given, **options, use_cache=False))
    for i in range(4):
        alone = {k: v[i : i + 1] for k, v in given.items()}
        assert torch.equal(model.generate(**alone, **options)[0], cached[i])


@pytest.mark.parametrize("combine", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(
    name: str, combine: str, tmp_path: Path
) -> None:
    model = MODELS[name](llama(), combine)
    given = inputs(name, model.base_model)
    model.save_pretrained(tmp_path)
    again = from_pretrained(llama(), tmp_path)
    assert type(again.rule) is type(model.rule)
    assert again.rule.settings() == model.rule.settings()
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(**given).logits, again(**given).logits)
    with torch.no_grad():
        next(again.rule.parameters()).add_(1)
    again.load_adapter(tmp_path)
    assert torch.equal(model(**given).logits, again(**given).logits)


def test_a_rule_that_is_not_imported_or_has_other_settings_is_named(tmp_path: Path) -> None:
    gated(llama()).save_pretrained(tmp_path)
    without_digests(tmp_path)
    description = (tmp_path / "polyroute.json").read_text()
    renamed = description.replace('"token-gate"', '"token-gote"')
    (tmp_path / "polyroute.json").write_text(renamed)
    with pytest.raises(InputError, match=r"rule 'token-gote' is not known here: import .*token-ga"):
        from_pretrained(llama(), tmp_path)
    (tmp_path / "polyroute.json").write_text(description.replace('"top_k"', '"top_x"'))
    with pytest.raises(InputError, match="rule 'token-gate' has other settings"):
        from_pretrained(llama(), tmp_path)
    (tmp_path / "polyroute.json").write_text(description)
    other = attach(
        llama(),
        MHRConfig(num_skills=5, num_heads=2, rank=2, alpha=7.0, combine="output"),
        ["a", "b"],
        rule=TokenGate(top_k=3),
    )
    with pytest.raises(InputError, match=r"has the rule 'token-gate' .*'top_k': 2"):
        other.load_adapter(tmp_path)


@pytest.mark.parametrize("combine", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_no_gradient(name: str, combine: str) -> None:
    plain, saving = (MODELS[name](llama(), combine).train() for _ in range(2))
    saving.gradient_checkpointing_enable()
    given = inputs(name, plain.base_model)
    found = []
    for model in (plain, saving):
        with model.record_gates() as gates:
            loss = model(**given).loss
            if name == "gate":
                assert len(gates) == len(model.sites)
                loss = loss + balance_loss(gates)
            loss.backward()
            assert len(gates) == (len(model.sites) if name == "gate" else 0)
        found.append([p.grad for p in model.learned() if p.grad is not None])
    assert len(found[0]) == len(list(plain.learned())) > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_near_the_exact_result(name: str) -> None:
    model = MODELS[name](llama())
    with torch.no_grad():  # weak updates, so that rounding does not pick other skills
        for parameter in (*model.inventory.parameters(), *model.rule.parameters()):
            parameter.mul_(0.2)
    given = inputs(name, model.base_model)
    exact = model(**given).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**given)
        output.loss.backward()
    gap = (output.logits.float() - exact).norm() / exact.norm()  # a token may take other skills
    assert gap < 0.05
    assert all(p.grad is not None for p in model.rule.parameters())


@torch.no_grad()
@pytest.mark.parametrize("combine", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_leaves_a_float64_model_as_it_is(name: str, combine: str) -> None:
    model = MODELS[name](llama().double(), combine)
    given = inputs(name, model.base_model)
    exact = model(**given).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(**given).logits, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("combine", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_it_compiles_to_one_graph(name: str, combine: str) -> None:
    torch._dynamo.reset()
    plain, compiled = (MODELS[name](llama(layers=1), combine) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    compiled.compile(backend=counter, fullgraph=True)
    given = inputs(name, plain.base_model)
    for _ in range(2):
        assert relative_error(compiled(**given).logits, plain(**given).logits) < TOLERANCE
    assert counter.frame_count == 1


def test_padding_does_not_count_in_the_balance_of_the_gates() -> None:
    model = gated(llama())
    given = batch(model.base_model)
    short = {k: v[:, :4] for k, v in given.items()}
    padded = dict(given)
    padded["attention_mask"] = given["attention_mask"].clone()
    padded["attention_mask"][:, 4:] = 0
    losses = []
    for one in (short, padded):
        with model.record_gates() as gates:
            model(**one)
        losses.append(balance_loss(gates[:1]))  # later layers see what padding attended to
    torch.testing.assert_close(*losses)


def test_gates_are_kept_only_while_they_are_recorded() -> None:
    model = gated(llama())
    model(**batch(model.base_model))
    assert model.mixer.gates is None
    with model.record_gates() as gates:
        model(**batch(model.base_model))
    assert [gate.site for gate in gates] == list(range(len(model.sites)))
    assert gates[0].weights.shape == (4, 6, 2, 5)


@pytest.mark.parametrize("name", MODELS)
def test_no_task_of_such_a_rule_is_merged_or_exported(name: str, tmp_path: Path) -> None:
    model = MODELS[name](llama())
    for what, call in (
        ("merged", lambda: model.merge("a")),
        ("exported", lambda: model.export_peft("a", tmp_path / "a")),
        ("exported", lambda: model.factors_of("a")),
        ("shown as weights", lambda: model.weights_of("a")),
    ):
        with pytest.raises(InputError, match=rf"more than the task.*cannot be {what}: use 'mu'"):
            call()
    assert not (tmp_path / "a").exists()
    assert model.merged_task is None


@pytest.mark.parametrize("combine", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_the_average_of_the_skills_can_be_routed_merged_and_trained(
    name: str, combine: str
) -> None:
    model = MODELS[name](llama(), combine)
    given = batch(model.base_model)
    average = model(**given, tasks="mu").logits
    model.merge("mu")
    assert relative_error(model.base_model(**given).logits, average) < 1e-5
    model.unmerge()
    model.set_phase("mu")
    assert relative_error(model(**given, tasks="a").logits, average) < 1e-5
    rank = 2 * (model.inventory.num_skills and {"gate": 5, "condition": 3}[name])
    assert model.adapter_config.rank == (rank if combine == "output" else 2)
    assert list(model.rule.parameters()) == []
    assert [group["name"] for group in model.param_groups()] == ["skills"]


def test_phases_train_the_rule_where_they_train_routing() -> None:
    model = gated(llama())
    both = {"skills", "rule"}
    for phase, trains in (("full", both), ("z", {"rule"}), ("random", both)):
        before = [p.detach().clone() for p in model.rule.parameters()]
        assert {group["name"] for group in model.param_groups(phase)} == trains
        changed = any(
            not torch.equal(p, q) for p, q in zip(model.rule.parameters(), before, strict=True)
        )
        assert changed == (phase == "random")


def test_adapting_side_by_side_is_refused_where_tasks_share_parameters() -> None:
    base, tokenizer = base_models.llama()
    model, kind = gated(base, heads=1), kind_of(base, tokenizer)
    examples = [{"input": "a cat", "target": "yes"}, {"input": "a dog", "target": "no"}]
    with pytest.raises(InputError, match=r"rule 'token-gate' has parameters that all tasks share"):
        adapt_many(model, {"new": examples}, kind=kind, phase="full", steps=1)
    (found,) = adapt_many(model, {"new": examples}, kind=kind, phase="mu", steps=20, lr=1e-2)
    assert found.last_loss < found.first_loss


def test_a_batch_needs_no_tasks_but_a_condition_of_the_right_shape() -> None:
    model = conditioned(llama())
    given = batch(model.base_model)
    with pytest.raises(InputError, match=r"condition=c with c of shape \[batch, 2\]"):
        model(**given)
    with pytest.raises(InputError, match=r"condition=c with c of shape \[batch, 2\]"):
        model(**given, condition=torch.ones(4, 3))
    with pytest.raises(InputError, match="3 routed examples"):
        model(**given, condition=torch.ones(3, 2))
    with pytest.raises(InputError, match="unknown task 'c'"):
        model(**given, tasks="c", condition=CONDITION)
    named = model(**given, tasks="a", condition=CONDITION).logits
    assert torch.equal(named, model(**given, condition=CONDITION).logits)
    with model.route("a", condition=CONDITION):
        assert torch.equal(named, model(**given).logits)
    one = model(**rows(given, 1), condition=CONDITION[1:2]).logits
    assert relative_error(named[1:2], one) < 1e-5


def test_a_rule_must_be_one_and_gates_need_lora() -> None:
    config = MHRConfig(num_skills=2, num_heads=1)
    with pytest.raises(InputError, match="rule must be a RouteRule, not a str"):
        attach(llama(), config, ["a"], rule="token-gate")  # type: ignore[arg-type]
    ia3 = attach(llama(), MHRConfig(num_skills=2, num_heads=1, adapter="ia3"), [], rule=TokenGate())
    with pytest.raises(InputError, match=r"a gate mixes LoRA skills, and these are \(IA\)\^3"):
        ia3(**batch(ia3.base_model))


def test_the_core_knows_nothing_of_the_two_rules() -> None:
    package = Path(sys.modules[RouteRule.__module__].__file__ or "").parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "TokenGate" not in text, path
        assert "ConditionRule" not in text, path


def test_a_rule_has_a_name_of_its_own_and_settings_that_are_json() -> None:
    class Nameless(RouteRule):
        needs_tasks = False

    class Heir(TokenGate):
        """Without a name it would be saved as its parent."""

    class Odd(RouteRule, name="odd"):
        def settings(self) -> dict[str, Any]:
            return {"tensor": torch.ones(1)}

    config = MHRConfig(num_skills=2, num_heads=1)
    for rule in (Nameless(), Heir()):
        with pytest.raises(InputError, match=r"class (Nameless|Heir)\(.*, name="):
            attach(llama(), config, [], rule=rule)
    with pytest.raises(InputError, match="settings of the rule 'odd' must be JSON"):
        attach(llama(), config, [], rule=Odd())


def test_a_rule_belongs_to_one_model() -> None:
    rule = TokenGate()
    config = MHRConfig(num_skills=2, num_heads=1)
    attach(llama(), config, [], rule=rule)
    with pytest.raises(InputError, match="this rule belongs to another model: make a new one"):
        attach(llama(), config, [], rule=rule)


@pytest.mark.parametrize(
    "setting",
    [{"method": "shared"}, {"method": "private"}, {"gate": "straight_through"},
     {"normalization": "l2"}, {"logit_dropout": 0.1}, {"shared_skill": True}, {"anneal_steps": 3}],
)  # fmt: skip
def test_settings_of_the_table_are_refused_beside_a_rule_without_one(setting: Any) -> None:
    config = MHRConfig(**{"num_skills": None if "method" in setting else 2, **setting})
    with pytest.raises(InputError, match=f"{next(iter(setting))}.*rule 'token-gate'"):
        attach(llama(), config, ["a"], rule=TokenGate())


def test_mu_does_not_share_a_batch_with_tasks_under_a_rule_that_looks_at_the_input() -> None:
    model = gated(llama())
    given = batch(model.base_model)
    with pytest.raises(InputError, match="'mu' cannot share a batch with other tasks"):
        model(**given, tasks=["a", "mu", "a", "b"])
    model(**given, tasks=["mu"] * 4)


def test_the_mask_of_a_rule_is_that_of_the_batch_in_parts_too() -> None:
    seen: list[Any] = []

    class Watch(RouteRule, name="watch"):
        needs_tasks = False

        def factors(self, batch: Any, mixer: Any) -> Any:
            seen.append(None if batch.mask is None else tuple(batch.mask.shape))
            return mixer.mix(mixer.uniform(1), batch)

    model = attach(t5(), MHRConfig(num_skills=2, num_heads=1), [], rule=Watch())
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    model.generate(torch.ones(2, 4).long(), attention_mask=mask, max_new_tokens=2)
    assert seen[0] == (2, 4)  # the encoder, which generate calls on its own
    seen.clear()
    model = attach(llama(), MHRConfig(num_skills=2, num_heads=1), [], rule=Watch())
    options = {"max_new_tokens": 2, "cache_implementation": "static"}
    model.generate(torch.ones(2, 4).long(), attention_mask=mask, **options)
    assert all(shape is None or len(shape) == 2 for shape in seen)


def test_float64_models_have_rules_in_float64() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6)).double()
    config = MHRConfig(num_skills=3, num_heads=2, rank=2, alpha=5.0)
    model = shake(attach(base, config, [], rule=ConditionRule(width=2)))
    assert {p.dtype for p in model.rule.parameters()} == {torch.float64}
    x, condition = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    learned = tuple(model.learned())
    assert torch.autograd.gradcheck(lambda *_: model(x, condition=condition), learned)


def test_a_fixed_rule_of_ones_own_is_adapted_by_its_average_alone() -> None:
    from polyroute.routes.rule import Choice
    from polyroute.routes.table_rules import TableRule

    class Sharp(TableRule, name="sharp"):
        def choose(self, rows: Any, mixer: Any, *, training: bool) -> Choice:
            choice = super().choose(rows, mixer, training=training)
            assert choice.weights is not None
            return Choice(torch.softmax(9 * choice.weights, -1), choice.sets)

    base, tokenizer = base_models.llama()
    config = MHRConfig(num_skills=3, num_heads=1, method="poly")
    model = shake(attach(base, config, ["a"], rule=Sharp()))
    kind, examples = kind_of(base, tokenizer), [{"input": "a cat", "target": "yes"}] * 2
    for phase in ("z", "full"):
        with pytest.raises(InputError, match="rule 'sharp'"):
            adapt_many(model, {"new": examples}, kind=kind, phase=phase, steps=1)
    adapt_many(model, {"new": examples}, kind=kind, phase="mu", steps=1)
    with pytest.raises(InputError, match="rule 'sharp'"):
        adapt_many(model, {"new": examples}, kind=kind, phase="mu", steps=1, init="a")
