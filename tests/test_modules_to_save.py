"""Whole modules train beside the inventory, and are saved, loaded and exported with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import TASKS, batch, bert, llama, relative_error, rows, shake
from torch import nn

from polyroute import InputError, MHRConfig, RoutedModel, attach, from_pretrained

TARGETS = ["query", "value"]


def classifier(seed: int = 1) -> nn.Module:
    """BERT with a random head."""
    model = bert()
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.classifier.bias)
    return model


def attached(
    base: nn.Module | None = None, modules: Any = ("classifier",), **config: Any
) -> RoutedModel:
    config = {"num_heads": 4, "num_skills": 3, "rank": 2, "alpha": 5.0, **config}
    settings = MHRConfig(target_modules=TARGETS, modules_to_save=modules, **config)
    return shake(attach(classifier() if base is None else base, settings, TASKS))


def trained(model: RoutedModel, phase: str = "full", steps: int = 3, **rates: float) -> RoutedModel:
    inputs, labels = batch(model.base_model), torch.tensor([0, 3, 1, 7])
    optimizer = torch.optim.AdamW(model.param_groups(phase, lr=1e-2, **rates))
    for _ in range(steps):
        logits = model(**inputs, tasks=list(TASKS)).logits
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def head(model: Any) -> list[torch.Tensor]:
    base = model.base_model if isinstance(model, RoutedModel) else model
    return [p.detach().clone() for p in base.classifier.parameters()]


@pytest.mark.parametrize("phase", ["full", "z", "mu", "mu-uncollapsed", "random"])
def test_the_module_trains_in_every_phase_and_nothing_else_of_the_base_does(phase: str) -> None:
    model = attached()
    before = {n: p.detach().clone() for n, p in model.base_model.named_parameters()}
    trained(model, phase)
    changed = {
        n for n, p in model.base_model.named_parameters() if not torch.equal(p.detach(), before[n])
    }
    assert changed == {"classifier.weight", "classifier.bias"}
    groups = {g["name"]: g["params"] for g in model.param_groups()}
    assert {id(p) for p in groups["modules"]} == {
        id(p) for p in model.base_model.classifier.parameters()
    }
    assert {id(p) for g in groups.values() for p in g} <= {id(p) for p in model.learned()}


def test_saved_and_loaded_the_module_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = trained(attached(modules=["classifier", "pooler.dense"]))
    model.save_pretrained(tmp_path)
    for seed in (1, 2):  # whatever the new head was before
        base = classifier(seed)
        again = from_pretrained(base, tmp_path)
        inputs = batch(base)
        assert torch.equal(
            again(**inputs, tasks=list(TASKS)).logits, model(**inputs, tasks=list(TASKS)).logits
        )
        assert again.adapter_config.modules_to_save == ("classifier", "pooler.dense")
        fresh = trained(attached(modules=["classifier", "pooler.dense"], num_skills=3))
        fresh.load_adapter(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(head(fresh), head(model), strict=True))


def test_the_rest_of_the_base_model_is_still_compared(tmp_path: Path) -> None:
    trained(attached()).save_pretrained(tmp_path)
    other = classifier()
    with torch.no_grad():
        other.bert.pooler.dense.weight.add_(0.1)
    with pytest.raises(InputError, match=r"parameter 'bert\.pooler\.dense\.weight' differ"):
        from_pretrained(other, tmp_path)
    assert not any(p.grad_fn for p in other.parameters())


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = trained(attached())
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "modules.safetensors").unlink()
    with pytest.raises(InputError, match=r"modules\.safetensors"):
        from_pretrained(classifier(), tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    trained(model).save_pretrained(tmp_path / "three")
    later = (tmp_path / "three" / "modules.safetensors").read_bytes()
    (tmp_path / "two" / "modules.safetensors").write_bytes(later)
    with pytest.raises(InputError, match="are of two saves"):
        from_pretrained(classifier(), tmp_path / "two")
    base = classifier()
    untouched = head(base)
    with pytest.raises(InputError):
        from_pretrained(base, tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(head(base), untouched, strict=True))
    with pytest.raises(InputError, match="on one side only"):
        attached(modules=None).load_adapter(tmp_path / "three")


def test_saving_without_modules_leaves_no_file_of_an_earlier_save(tmp_path: Path) -> None:
    attached().save_pretrained(tmp_path)
    assert (tmp_path / "modules.safetensors").exists()
    attached(modules=None).save_pretrained(tmp_path)
    assert not (tmp_path / "modules.safetensors").exists()
    from_pretrained(classifier(), tmp_path)


def test_unloading_puts_the_module_back_and_merging_keeps_it() -> None:
    base = classifier()
    before, grads = head(base), [p.requires_grad for p in base.parameters()]
    model = trained(attached(base))
    after = head(model)
    assert not torch.equal(before[0], after[0])
    assert model.unload() is base
    assert all(torch.equal(a, b) for a, b in zip(head(base), before, strict=True))
    assert [p.requires_grad for p in base.parameters()] == grads
    model = trained(attached(base))
    inputs = batch(base)
    expected = model(**inputs, tasks="birch").logits
    model.merge("birch")
    plain = model.unload()
    assert relative_error(plain(**inputs).logits, expected) < 1e-5


@pytest.mark.parametrize("task", ["birch", "mu"])
def test_an_exported_task_computes_the_same_in_peft(task: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(attached())
    model.export_peft(task, tmp_path)
    exported = peft.PeftModel.from_pretrained(classifier(2), tmp_path).eval()
    inputs = batch(model.base_model)
    assert relative_error(exported(**inputs).logits, model(**inputs, tasks=task).logits) < 1e-5


def test_norms_of_a_language_model_train_beside_the_skills(tmp_path: Path) -> None:
    config = MHRConfig(num_heads=2, num_skills=2, modules_to_save=["norm", "input_layernorm"])
    model = shake(attach(llama(), config, TASKS))
    assert len(model.wrapping.trained) == 1 + 2
    inputs = batch(model.base_model)
    model(**inputs, tasks=list(TASKS)).loss.backward()
    norms = [
        m for n, m in model.base_model.named_modules() if n.endswith(("norm", "input_layernorm"))
    ]
    assert all(p.grad is not None for m in norms[:1] for p in m.parameters())
    model.save_pretrained(tmp_path)
    from_pretrained(llama(), tmp_path)


def test_counters_of_batch_norms_are_saved_too(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    config = MHRConfig(num_heads=2, num_skills=2, modules_to_save=["1"])
    model = attach(net().train(), config, TASKS)
    model(torch.randn(6, 4), tasks="amber")
    model.save_pretrained(tmp_path)
    again = from_pretrained(net(), tmp_path)
    state = again.base_model[1].state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.base_model[1].state_dict().items())
    assert int(state["num_batches_tracked"]) == 1


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        (["clasifier"], "modules_to_save names 'clasifier', which matches no module of Bert"),
        (["encoder"], r"names 'encoder', which holds the adapted layer 'bert\.encoder\..*query'"),
        (["query"], "holds the adapted layer 'bert.*query'"),
        ("classifier", "modules_to_save must be a list of name endings"),
        ([3], "modules_to_save must be a list of name endings"),
    ],
)
def test_modules_that_cannot_be_are_refused_before_anything_changes(
    modules: Any, sentence: str
) -> None:
    base = classifier()
    before = [(n, type(m)) for n, m in base.named_modules()]
    with pytest.raises(InputError, match=sentence):
        attached(base, modules)
    assert before == [(n, type(m)) for n, m in base.named_modules()]
    assert all(p.requires_grad for p in base.parameters())


def test_the_adafactor_and_the_row_optimizer_step_the_module() -> None:
    from polyroute.optimizers import make_optimizer

    for make in (
        lambda m: make_optimizer("adafactor", m.param_groups("full", lr=1e-2), m),
        lambda m: m.optimizer("full", lr=1e-2),
    ):
        model = attached()
        before, optimizer = head(model), make(model)
        inputs = rows(batch(model.base_model), 0, 1)
        model(**inputs, tasks=["amber", "dune"]).logits.square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, head(model), strict=True))


def test_adapting_many_tasks_keeps_the_module_as_it_is(tmp_path: Path) -> None:
    import base_models

    from polyroute import adapt_many
    from polyroute.kinds.choose import kind_of

    base, tokenizer = base_models.llama()
    config = MHRConfig(num_heads=2, num_skills=2, modules_to_save=["norm"])
    model = shake(attach(base, config, ["old"]))
    with torch.no_grad():
        base.model.norm.weight.mul_(1.5)
    before = base.model.norm.weight.detach().clone()
    examples = [{"input": "a cat", "target": "yes"}, {"input": "a dog", "target": "no"}]
    (found,) = adapt_many(
        model, {"new": examples}, kind=kind_of(base, tokenizer), phase="mu", steps=2
    )
    assert torch.equal(base.model.norm.weight, before)
    found.export_peft(tmp_path)
    peft = pytest.importorskip("peft")
    other, _ = base_models.llama()
    other.load_state_dict(model.base_model.state_dict())
    exported = peft.PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(
        exported.base_model.model.model.norm.modules_to_save["default"].weight, before
    )


@pytest.mark.filterwarnings("ignore:.*parameters of the base model trained or changed")
def test_a_trained_head_that_is_resized_goes_on_training_and_is_saved(tmp_path: Path) -> None:
    config = MHRConfig(num_heads=2, num_skills=2, modules_to_save=["lm_head"])
    base = llama()
    model = shake(attach(base, config, TASKS))
    model.resize_token_embeddings(48)
    head = base.lm_head.weight
    assert head.requires_grad
    assert id(head) in {id(p) for g in model.param_groups() for p in g["params"]}
    inputs = batch(base)
    optimizer = torch.optim.AdamW(model.param_groups(lr=1e-1))
    before = head.detach().clone()
    model(**inputs, tasks=list(TASKS)).loss.backward()
    optimizer.step()
    assert not torch.equal(before, head)
    model.save_pretrained(tmp_path)
    other = llama()
    other.resize_token_embeddings(48)
    other.model.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in base.model.state_dict().items()}
    )
    again = from_pretrained(other, tmp_path)
    expected = model(**inputs, tasks="amber").logits
    assert torch.equal(again(**inputs, tasks="amber").logits, expected)
    assert model.unload() is base  # a head of another size cannot be put back


def test_tied_modules_are_not_exported_to_a_format_that_unties_them(tmp_path: Path) -> None:
    config = llama().config
    config.tie_word_embeddings = True
    for name in ("lm_head", "embed_tokens"):
        torch.manual_seed(0)
        base = type(llama())(config)
        settings = MHRConfig(num_heads=2, num_skills=2, modules_to_save=[name])
        model = attach(base, settings, TASKS)
        with pytest.raises(InputError, match="tied"):
            model.export_peft("amber", tmp_path / name)
        model.save_pretrained(tmp_path / f"{name} saved")
        torch.manual_seed(0)
        from_pretrained(type(llama())(config), tmp_path / f"{name} saved")


def test_a_tied_embedding_trains_beside_an_adapted_head(tmp_path: Path) -> None:
    config = llama().config
    config.tie_word_embeddings = True

    def base() -> Any:
        torch.manual_seed(0)
        return type(llama())(config)

    settings = MHRConfig(
        num_heads=2, num_skills=2, target_modules=["lm_head"], modules_to_save=["embed_tokens"]
    )
    model = attach(base(), settings, TASKS)
    with torch.no_grad():
        model.base_model.model.embed_tokens.weight.add_(0.1)
    model.save_pretrained(tmp_path)
    again = from_pretrained(base(), tmp_path)
    inputs = batch(base())
    assert torch.equal(again(**inputs, tasks="amber").logits, model(**inputs, tasks="amber").logits)


def test_a_trained_module_that_was_replaced_is_named(tmp_path: Path) -> None:
    model = attached()
    model.base_model.classifier = nn.Linear(32, 8)
    with pytest.warns(UserWarning, match="classifier"):
        model.save_pretrained(tmp_path)
