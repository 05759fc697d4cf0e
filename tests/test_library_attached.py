"""A library attached to its base model: each LoRA is a task, in generation and in training."""

import json
from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from models import batch, gpt2, llama, relative_error
from safetensors.torch import load_file, save_file
from test_delta import flat_layers
from test_lora_import import llava, written
from torch import Tensor, nn
from unlike_loras import SETTINGS
from unsigned import without_digests

import polyroute as pr
from polyroute.adapting.slots import Slots
from polyroute.exchange import write_inventory
from polyroute.layer.factors import LoRAFactors
from polyroute.routes.ragged import RaggedInventory

peft = pytest.importorskip("peft")


@pytest.fixture
def model(loras: Path) -> pr.RoutedModel:
    return pr.attach(llama(), pr.Library.from_peft(loras))


def of_peft(folder: Path) -> Tensor:
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(llama(), folder).eval()
        logits: Tensor = model(**batch(llama())).logits
    return logits


@torch.no_grad()
def logits(model: nn.Module, tasks: str | Sequence[str]) -> Tensor:
    found: Tensor = model(**batch(llama()), tasks=tasks).logits
    return found


def test_each_lora_computes_what_it_does_in_peft(model: pr.RoutedModel, loras: Path) -> None:
    assert model.tasks == tuple(sorted(SETTINGS))
    for name in SETTINGS:
        assert relative_error(logits(model, name), of_peft(loras / name)) < 1e-5


def test_a_batch_uses_several_loras(model: pr.RoutedModel) -> None:
    names = ["rs", "plain", "patterns", "rs"][: len(batch(llama())["input_ids"])]
    mixed = logits(model, names)
    for row, name in enumerate(names):
        assert relative_error(mixed[row], logits(model, name)[row]) < 1e-5


def test_generation_is_that_of_each_lora(model: pr.RoutedModel, loras: Path) -> None:
    ids = batch(llama())["input_ids"][:2]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    found = model.generate(ids, tasks=["rs", "plain"], **options)
    for row, name in enumerate(("rs", "plain")):
        theirs = peft.PeftModel.from_pretrained(llama(), loras / name).eval()
        alone = theirs.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


def test_mu_is_the_exact_mean(model: pr.RoutedModel, loras: Path, tmp_path: Path) -> None:
    pr.Library.from_peft(loras).merge("mean").save_peft(tmp_path)
    expected = of_peft(tmp_path)
    assert relative_error(logits(model, "mu"), expected) < 1e-5
    model.set_phase("mu")
    assert relative_error(logits(model, "rs"), expected) < 1e-5
    assert model.inventory.num_skills == 1
    assert model.counts()["inventory"] == model.counts()["one_adapter"]


def test_what_is_exported_is_the_lora(model: pr.RoutedModel, loras: Path, tmp_path: Path) -> None:
    library = pr.Library.from_peft(loras)
    for name in SETTINGS:
        model.export_peft(name, tmp_path / name)
        exported = pr.Delta.from_peft(tmp_path / name)
        own = library[name]
        there = {layer: rank for layer, rank in exported.ranks.items() if rank}
        assert there == own.ranks
        kept = pr.Delta({layer: exported.layers[layer] for layer in there}, exported.base)
        assert relative_error(flat_layers(kept), flat_layers(own)) < 1e-6
        assert relative_error(of_peft(tmp_path / name), of_peft(loras / name)) < 1e-5
    model.export_peft("mu", tmp_path / "mu")
    assert relative_error(of_peft(tmp_path / "mu"), logits(model, "mu")) < 1e-5


def test_a_saved_library_is_the_same(model: pr.RoutedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = pr.from_pretrained(llama(), tmp_path)
    some = pr.from_pretrained(llama(), tmp_path, tasks=["rs"])
    for name in SETTINGS:
        assert torch.equal(logits(again, name), logits(model, name))
    assert torch.equal(logits(some, "rs"), logits(model, "rs"))
    assert isinstance(some.inventory, RaggedInventory)
    assert some.inventory.num_skills == 1
    with torch.no_grad():
        model.inventory.get_parameter("lora_b.32x32").zero_()
    model.load_adapter(tmp_path)
    assert torch.equal(logits(again, "plain"), logits(model, "plain"))
    model.set_phase("mu")
    model.save_pretrained(tmp_path / "mu")
    mean = pr.from_pretrained(llama(), tmp_path / "mu")
    assert torch.equal(logits(mean, "rs"), logits(model, "rs"))


@pytest.mark.parametrize(("ranks", "sentence"), [
    ([2, 2], "is not the ranks of 3 skills"),
    ([2, 2, -1], "is not the ranks of 3 skills"),
    ([2, 2, 10**9], "does not fit: tensor"),
    (None, "is not the ranks of 3 skills"),
])  # fmt: skip
def test_damaged_ranks_are_refused(
    model: pr.RoutedModel, tmp_path: Path, ranks: list[int] | None, sentence: str
) -> None:
    model.save_pretrained(tmp_path)
    path = without_digests(tmp_path) / "polyroute.json"
    description = json.loads(path.read_text())
    description["sites"][3]["ranks"] = ranks
    path.write_text(json.dumps(description))
    with pytest.raises(pr.InputError, match=sentence):
        pr.from_pretrained(llama(), tmp_path)


def test_loras_come_and_go(model: pr.RoutedModel) -> None:
    before = {name: logits(model, name) for name in (*SETTINGS, "mu")}
    model.add_task("copy", init="rs")
    model.add_task("mean")
    model.keep_tasks(["mean", "copy", "plain"])
    assert torch.equal(logits(model, "copy"), before["rs"])
    assert torch.equal(logits(model, "plain"), before["plain"])
    expected = logits(model, "mean")
    assert relative_error(expected, before["mu"]) > 1e-3  # `mean` was one of four
    model.keep_tasks(["plain"])
    assert torch.equal(logits(model, "plain"), before["plain"])


@pytest.mark.parametrize("phase", ["full", "mu"])
def test_gradients_are_those_of_each_lora_alone(loras: Path, phase: str) -> None:
    """Many LoRAs in one step: what a LoRA learns does not depend on the others of the batch."""
    names = ["rs", "plain"]
    ids = batch(llama())["input_ids"][:2]
    model = pr.attach(llama(), pr.Library.from_peft(loras), names)
    model.set_phase(phase)  # type: ignore[arg-type]
    model(input_ids=ids, tasks=names).logits.square().sum().backward()
    together = [p.grad for p in model.inventory.parameters()]
    alone = pr.attach(llama(), pr.Library.from_peft(loras), names)
    alone.set_phase(phase)  # type: ignore[arg-type]
    for row, name in enumerate(names):
        alone(input_ids=ids[row : row + 1], tasks=name).logits.square().sum().backward()
    for one, other in zip(together, alone.inventory.parameters(), strict=True):
        assert one is not None
        assert other.grad is not None
        assert relative_error(one, other.grad) < 1e-4
    assert all(p.grad is None for p in model.base_model.parameters() if not p.requires_grad)


def test_training_one_lora_leaves_the_others(model: pr.RoutedModel) -> None:
    before = {name: logits(model, name) for name in SETTINGS}
    optimizer = model.optimizer("full", lr=1e-2)
    for _ in range(3):
        model(**batch(llama()), tasks="rs").logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(logits(model, "rs"), before["rs"]) > 1e-3
    for name in ("plain", "patterns"):
        assert torch.equal(logits(model, name), before[name])


@pytest.mark.parametrize(("phase", "init"), [("full", "rs"), ("mu", "uniform"), ("mu", "rs")])
def test_slots_start_where_the_library_is(model: pr.RoutedModel, phase: str, init: str) -> None:
    expected = logits(model, "mu" if init == "uniform" else init)
    with Slots(model, phase, 2) as slots:  # type: ignore[arg-type]
        slots.start(1, seed=0, init=init)
        assert relative_error(logits(model, "slot 1"), expected) < 1e-5


@pytest.mark.parametrize("init", ["uniform", "rs"])
def test_phase_z_trains_a_weight_for_each_lora(
    model: pr.RoutedModel, loras: Path, tmp_path: Path, init: str
) -> None:
    before = llama()(**batch(llama())).logits if init == "uniform" else logits(model, init)
    with Slots(model, "z", 2) as slots:
        slots.start(1, seed=0, init=init)
        (row,) = slots.parameters(1)["routes"]
        assert row.numel() == len(SETTINGS)
        assert relative_error(logits(model, "slot 1"), before) < 1e-2
        row.copy_(torch.tensor([0.5, -1.0, 0.25, 2.0])[: len(SETTINGS)])
        found = logits(model, "slot 1")
        model.export_peft("slot 1", tmp_path)
    weights = dict(zip(model.tasks, row.tolist(), strict=True))
    with torch.no_grad(), model.route(pr.Static(model, weights)):
        expected = model(**batch(llama())).logits
    assert relative_error(found, expected) < 1e-5
    assert relative_error(of_peft(tmp_path), expected) < 1e-5
    with pytest.raises(pr.InputError, match="phase 'z' trains routing logits"):
        model.set_phase("z")


def test_a_gate_mixes_loras_of_any_ranks(model: pr.RoutedModel, loras: Path) -> None:
    library = pr.Library.from_peft(loras)
    layer = "model.layers.0.self_attn.q_proj"
    site = [site.name for site in model.sites].index(layer)
    x = torch.randn(2, 3, 32)
    gate = torch.randn(2, 3, 1, 3)
    factors = model.inventory.gated(site, gate)
    found = factors.apply(model.sites[site].layer, x, 0.0)
    expected = model.sites[site].layer(x)
    for skill, name in enumerate(model.tasks):
        own = library[name].layers[layer]
        expected = expected + gate[..., skill] * (x @ own.a.t() @ own.b)
    assert relative_error(found, expected) < 1e-5


def test_what_does_not_fit_is_refused_and_changes_nothing(loras: Path, tmp_path: Path) -> None:
    library = pr.Library.from_peft(loras)
    base = llama()
    for other, sentence in (
        (gpt2(), "the library belongs to another base model: GPT2LMHeadModel has no layer"),
        (llama(hidden_size=16), "is 16 to 16 here, 32 to 32 there"),
    ):
        with pytest.raises(pr.InputError, match=sentence):
            pr.attach(other, library)
    with pytest.raises(pr.InputError, match="no LoRA 'plian': did you mean 'plain'"):
        pr.attach(base, library, ["plian"])
    with pytest.raises(pr.InputError, match="name at least one LoRA"):
        pr.attach(base, library, [])
    with pytest.raises(pr.InputError, match="leave sites and rule out"):
        pr.attach(base, library, sites=["model.layers.0.self_attn.q_proj"])
    with pytest.raises(pr.InputError, match="task 'rs' is given twice"):
        pr.attach(base, library, ["rs", "rs"])
    with pytest.raises(pr.InputError, match="tasks must be a list of names, not None"):
        pr.attach(base, pr.MHRConfig())
    model = pr.attach(base, library, ["rs"])
    with pytest.raises(pr.InputError, match="carries an inventory already"):
        pr.attach(model, library)
    for form in ("mttl", "peft-mhr", "peft-poly"):
        with pytest.raises(pr.InputError, match="cannot hold LoRAs of different"):
            write_inventory(model, tmp_path / form, form, None)


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=14, max_size=14))
def test_any_ranks_are_mixed_without_padding(ranks: list[list[int]]) -> None:
    """Weights, single skills and the mean, against sums of dense updates."""
    model = pr.attach(llama(), pr.MHRConfig(method="private"), ["a", "b", "c"])
    generator = torch.Generator().manual_seed(sum(map(sum, ranks)))
    inventory = RaggedInventory(model.sites, model.adapter_config, ranks)
    with torch.no_grad():
        for parameter in inventory.parameters():
            parameter.normal_(generator=generator)
    assert sum(p.numel() for p in inventory.parameters()) == sum(
        (site.d_in + site.d_out) * sum(own) for site, own in zip(model.sites, ranks, strict=True)
    )
    updates = [
        [dense(inventory.skill(site, skill)) for skill in range(3)]
        for site in range(len(model.sites))
    ]
    routers = [torch.zeros(len(stack.sites), dtype=torch.long) for stack in inventory.stacks]
    weights = torch.randn(2, 1, 1, 3, generator=generator)
    mixed = inventory.mix(weights, routers)
    for site, own in enumerate(mixed):
        assert isinstance(own, LoRAFactors)
        for task in range(2):
            expected = sum(weights[task, 0, 0, k] * updates[site][k] for k in range(3))
            assert torch.allclose(own.b[task].t() @ own.a[task], expected, atol=1e-4)
    picked = inventory.mix(None, routers, sets=torch.tensor([2, 0]))
    alone = inventory.mix(None, routers, sets=torch.tensor([1]))
    for site, (own, one) in enumerate(zip(picked, alone, strict=True)):
        assert isinstance(own, LoRAFactors)
        assert isinstance(one, LoRAFactors)
        for task, skill in enumerate((2, 0)):
            assert torch.allclose(own.b[task].t() @ own.a[task], updates[site][skill], atol=1e-5)
        assert len(one.a) == ranks[site][1]
        assert torch.allclose(dense(one), updates[site][1], atol=1e-5)
    model.unload()


def dense(own: LoRAFactors) -> Tensor:
    return (own.b.t() @ own.a).detach()


def renamed(folder: Path, to: Path) -> None:
    """A copy of a LoRA whose layers have the names of an older version of transformers."""
    to.mkdir(parents=True)
    (to / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    older = {
        k.replace("model.language_model.", "language_model.model."): t for k, t in tensors.items()
    }
    assert older.keys() != tensors.keys()
    save_file(older, to / "adapter_model.safetensors")


def test_loras_that_name_a_layer_differently_are_all_there(tmp_path: Path) -> None:
    settings = {"target_modules": r".*language_model.*\.(q|v)_proj"}
    written(tmp_path / "loras" / "new", llava, **settings)
    renamed(tmp_path / "loras" / "new", tmp_path / "loras" / "old")
    library = pr.Library.from_peft(tmp_path / "loras")
    model = pr.attach(llava(), library)
    assert isinstance(model.inventory, RaggedInventory)
    assert all(ranks == (3, 3) for ranks in model.inventory.ranks)
    for new, old in zip(model.factors_of("new"), model.factors_of("old"), strict=True):
        assert isinstance(new, LoRAFactors)
        assert isinstance(old, LoRAFactors)
        assert torch.equal(new.a, old.a)
        assert new.a.any()
    with pytest.warns(UserWarning, match="'new' has no layer in common with the others"):
        library.merge("mean")


def test_a_lora_that_changed_on_the_disk_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "one", r=2)
    library = pr.Library.from_peft({"one": tmp_path / "one"})
    written(tmp_path / "one", r=3)
    base = llama()
    with pytest.raises(pr.InputError, match="the LoRA 'one' has changed since"):
        pr.attach(base, library)
    pr.attach(base, pr.Library.from_peft({"one": tmp_path / "one"}))


def test_a_merged_model_refuses_rules(model: pr.RoutedModel) -> None:
    model.merge("mu")
    for rule in (pr.Arrow(), pr.Static(model)):
        with pytest.raises(pr.InputError, match="the model is merged with 'mu'; call unmerge"):
            logits(model, rule)  # type: ignore[arg-type]
    with pytest.raises(pr.InputError, match="the model is merged with 'mu'"):
        pr.freeze(model, pr.Arrow(), [batch(llama())] * 5)
    model.unmerge()
    logits(model, pr.Arrow())  # type: ignore[arg-type]


def test_rules_keep_to_their_loras_when_tasks_come_and_go(model: pr.RoutedModel) -> None:
    rs, arrow = pr.Static(model, {"rs": 1.0}), pr.Arrow(top_k=1)
    expected = logits(model, "rs")
    logits(model, arrow)  # type: ignore[arg-type]
    model.keep_tasks(["rs", "patterns"])
    assert relative_error(logits(model, rs), expected) < 1e-6  # type: ignore[arg-type]
    assert torch.equal(logits(model, arrow), logits(model, pr.Arrow(top_k=1)))  # type: ignore[arg-type]
    model.keep_tasks(["rs"])  # other layers have no LoRA any more
    assert relative_error(logits(model, arrow), expected) < 1e-6  # type: ignore[arg-type]
    model.add_task("more", init="rs")
    with pytest.raises(pr.InputError, match="this rule knows nothing of 'more'"):
        logits(model, rs)  # type: ignore[arg-type]


def test_packed_examples_of_one_task_are_kept_apart(model: pr.RoutedModel) -> None:
    ids = batch(llama())["input_ids"][:2, :6]
    packed = ids.reshape(1, -1)
    positions = torch.arange(6).repeat(2)[None]
    for route in ("rs", pr.Arrow()):
        with torch.no_grad():
            found = model(input_ids=packed, position_ids=positions, tasks=route, segments=[[6, 6]])
            apart = model(input_ids=ids, tasks=route)
        assert relative_error(found.logits.reshape(apart.logits.shape), apart.logits) < 1e-5
    with pytest.raises(pr.InputError, match="longer than their row"):
        model(input_ids=packed, position_ids=positions, tasks="rs", segments=[[600, 6]])
