"""The method MHR of PEFT, used as PEFT's users use any other, against a model of `attach`."""

import copy
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TASKS, batch, bert, gpt2, llama, relative_error, routed, stack, t5
from torch import Tensor, nn

from polyroute import InputError, MHRConfig, RoutedModel, attach
from polyroute.exchange import read_inventory
from polyroute.exchange.peft_mhr import write_peft_mhr

peft = pytest.importorskip("peft")
pp = pytest.importorskip("polyroute.peft")

Build = Callable[[], nn.Module]
MIXED = ["birch", "amber", "dune", "birch"]
KINDS = {t5: "SEQ_2_SEQ_LM", llama: "CAUSAL_LM", gpt2: "CAUSAL_LM", bert: "SEQ_CLS", stack: None}
TOLERANCE = 2e-6
each_base = pytest.mark.parametrize("build", [t5, llama, gpt2])
each_batch = pytest.mark.parametrize("tasks", ["cedar", MIXED, [2, 0, 3, 2], "mu"], ids=str)


def config(**settings: Any) -> Any:
    return pp.MHRConfig(
        **{"tasks": list(TASKS), "num_skills": 4, "num_heads": 4, "task_type": "CAUSAL_LM",
           **settings}
    )  # fmt: skip


def in_peft(build: Build, folder: Path, **settings: Any) -> tuple[nn.Module, RoutedModel]:
    """A routed model, and the same as an adapter that PEFT has loaded."""
    ours = routed(build(), num_heads=4, rank=2, alpha=3.0, **settings)
    write_peft_mhr(ours, folder)
    return peft.PeftModel.from_pretrained(build(), folder, is_trainable=True).eval(), ours


def new(build: Build = llama, **settings: Any) -> nn.Module:
    """A fresh adapter with random skills and routes."""
    model: nn.Module = peft.get_peft_model(build(), config(**settings)).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"mhr_adapters.{name}." in key:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert len(actual) > 1
    assert all(relative_error(actual[name], expected[name]) < TOLERANCE for name in expected)


# -------------------------------------------------------------------- the same as `attach`


@each_batch
@each_base
@torch.no_grad()
def test_outputs_are_those_of_the_routed_model(tmp_path: Path, build: Build, tasks: Any) -> None:
    model, ours = in_peft(build, tmp_path)
    inputs = batch(build())
    expected = ours(**inputs, tasks=tasks).logits
    assert relative_error(model(**inputs, tasks=tasks).logits, expected) < TOLERANCE
    with pp.route(model, tasks):
        assert relative_error(model(**inputs).logits, expected) < TOLERANCE


@pytest.mark.parametrize("settings", [
    {"adapter": "ia3", "rank": 1},
    {"method": "private"},
    {"method": "shared"},
    {"method": "poly", "gate": "straight_through", "shared_skill": True},
    {"normalization": "l2"},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_every_kind_of_inventory_becomes_an_adapter(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    heads = {} if settings.get("method") else {"num_heads": 4}
    ours, inputs = routed(llama(), **heads, **settings), batch(llama())
    write_peft_mhr(ours, tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    expected = ours(**inputs, tasks=MIXED).logits
    assert relative_error(model(**inputs, tasks=MIXED).logits, expected) < TOLERANCE


def test_gradients_are_those_of_the_routed_model(tmp_path: Path) -> None:
    model, ours = in_peft(llama, tmp_path)
    inputs = batch(llama())
    for each in (model, ours):
        each.train()(**inputs, tasks=MIXED).loss.backward()
    name = "model.layers.1.mlp.up_proj"
    site = next(i for i, site in enumerate(ours.sites) if site.name == name)
    stack_ = next(s for s in ours.inventory.stacks if site in s.sites)
    theirs = ours.inventory.get_parameter(f"lora_b.{stack_.key}").grad[stack_.sites.index(site)]
    adapter = model.get_submodule(f"base_model.model.{name}.mhr_adapters.default")
    assert relative_error(adapter.skills.lora_b[stack_.key].grad[0], theirs) < TOLERANCE
    table = ours.routes.logits.grad.view(len(TASKS), len(ours.sites), -1)[:, site]
    assert relative_error(adapter.routes.logits.grad, table) < TOLERANCE


def test_an_adapter_becomes_an_inventory_and_back_with_every_bit(tmp_path: Path) -> None:
    model = new(rank=3)
    model.save_pretrained(tmp_path / "peft")
    ours = read_inventory(llama(), tmp_path / "peft")
    inputs = batch(llama())
    expected = model(**inputs, tasks=MIXED).logits
    assert relative_error(ours(**inputs, tasks=MIXED).logits, expected) < TOLERANCE
    write_peft_mhr(ours, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "back")
    state = back.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert back.peft_config["default"].settings() == model.peft_config["default"].settings()


@torch.no_grad()
def test_an_adapter_of_the_output_layer_comes_with_a_copy_of_it(tmp_path: Path) -> None:
    model = new(target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    ours, inputs = read_inventory(llama(), tmp_path), batch(llama())
    expected = model(**inputs, tasks="birch").logits
    assert relative_error(ours(**inputs, tasks="birch").logits, expected) < TOLERANCE


# -------------------------------------------------------------------- what PEFT does with adapters


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
@torch.no_grad()
def test_a_saved_adapter_loads_under_any_name(
    tmp_path: Path, name: str, low_cpu_mem_usage: bool
) -> None:
    model, inputs = new(t5, task_type="SEQ_2_SEQ_LM"), batch(t5())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        t5(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    expected = model(**inputs, tasks=MIXED).logits
    assert torch.equal(loaded(**inputs, tasks=MIXED).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@torch.no_grad()
def test_adapters_are_added_chosen_summed_disabled_and_deleted() -> None:
    model, inputs = new(), batch(llama())
    first, bare = model(**inputs, tasks=MIXED).logits, llama()(**inputs).logits
    model.add_adapter("second", config(tasks=["amber", "oak"], num_heads=2, rank=1))
    shake(model, "second", seed=2)
    assert torch.equal(model(**inputs, tasks=MIXED).logits, first)
    model.set_adapter("second")
    second = model(**inputs, tasks="oak").logits
    with pytest.raises(InputError, match="unknown task 'birch'"):
        model(**inputs, tasks=MIXED)
    model.base_model.set_adapter(["default", "second"])
    both = model(**inputs, tasks="amber").logits
    with model.disable_adapter(), pp.route(model, "amber"):
        assert torch.equal(model(**inputs).logits, bare)
    with pp.route(model, None):
        assert torch.equal(model(**inputs).logits, bare)
    model.set_adapter("default")
    assert relative_error(model(**inputs, tasks="amber").logits, both) > 1e-3
    model.delete_adapter("second")
    assert torch.equal(model(**inputs, tasks=MIXED).logits, first)
    assert relative_error(second, first) > 1e-3


@torch.no_grad()
def test_two_active_adapters_add_up(tmp_path: Path) -> None:
    model, x = new(stack, task_type=None, target_modules=["up"]), torch.randn(4, 8)
    model.add_adapter("second", config(task_type=None, target_modules=["up"], rank=1))
    shake(model, "second", seed=2)
    up = model.base_model.model.up
    with pp.route(model, MIXED):
        one = up(x)
        up.set_adapter("second")
        two = up(x)
        up.set_adapter(["default", "second"])
        assert relative_error(up(x), one + two - up.base_layer(x)) < TOLERANCE


@torch.no_grad()
def test_transformers_own_integration_loads_adds_and_saves(tmp_path: Path) -> None:
    model, inputs = new(), batch(llama())
    model.save_pretrained(tmp_path / "one")
    expected = model(**inputs, tasks=MIXED).logits
    native = llama()
    native.load_adapter(tmp_path / "one", adapter_name="mine")
    assert torch.equal(native(**inputs, tasks=MIXED).logits, expected)
    native.save_pretrained(tmp_path / "two")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "two")
    with pp.route(again, MIXED):
        assert torch.equal(again(**inputs).logits, expected)
    native.add_adapter(config(tasks=["oak"]), adapter_name="fresh")
    native.set_adapter("fresh")
    assert torch.equal(native(**inputs, tasks="oak").logits, llama()(**inputs).logits)


@torch.no_grad()
def test_a_copied_model_has_routes_of_its_own() -> None:
    model, inputs = new(), batch(llama())
    twin = copy.deepcopy(model)
    shake(twin, seed=5)
    with pp.route(model, "cedar"), pp.route(twin, "dune"):
        ours, theirs = model(**inputs).logits, twin(**inputs).logits
    assert torch.equal(ours, model(**inputs, tasks="cedar").logits)
    assert torch.equal(theirs, twin(**inputs, tasks="dune").logits)
    with pytest.raises(InputError, match="no task is routed"):
        twin(**inputs)


@torch.no_grad()
def test_threads_do_not_see_each_others_tasks() -> None:
    model, inputs = new(), batch(llama())
    expected = {task: model(**inputs, tasks=task).logits for task in TASKS}
    wrong: list[str] = []

    def serve(task: str) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(model(**inputs, tasks=task).logits, expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("build", "beams"), [(t5, 1), (t5, 3), (llama, 3)])
def test_generation_is_that_of_the_routed_model(tmp_path: Path, build: Build, beams: int) -> None:
    model, ours = in_peft(build, tmp_path)
    ids = batch(build())["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 5, "num_beams": beams, "do_sample": False,
               "num_return_sequences": min(beams, 2)}  # fmt: skip
    expected = ours.generate(**options, tasks=MIXED)
    assert torch.equal(model.generate(**options, tasks=MIXED), expected)
    with pp.route(model, MIXED):
        assert torch.equal(model.generate(**options), expected)
    assert not torch.equal(model.generate(**options, tasks="cedar"), expected)


@torch.no_grad()
def test_modules_to_save_and_classification(tmp_path: Path) -> None:
    model = new(bert, task_type="SEQ_CLS", target_modules=["query", "dense"], num_heads=2)
    inputs = batch(bert())
    saved = [n for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    assert saved
    model.get_parameter(saved[0]).mul_(3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path)
    expected = model(**inputs, tasks=MIXED).logits
    assert torch.equal(loaded(**inputs, tasks=MIXED).logits, expected)
    assert model.get_model_status().enabled


@torch.no_grad()
def test_adapters_stay_in_fp32_on_a_base_in_bf16(tmp_path: Path) -> None:
    model = new(lambda: llama().bfloat16())
    kinds = {p.dtype for n, p in model.named_parameters() if "mhr_" in n}
    assert kinds == {torch.float32}
    inputs = batch(llama())
    exact = new()(**inputs, tasks=MIXED).logits
    assert relative_error(model(**inputs, tasks=MIXED).logits, exact) < 0.05
    lower = peft.get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in lower.named_parameters() if "mhr_" in n} == {torch.bfloat16}
    assert lower(**inputs, tasks=MIXED).logits.isfinite().all()


# -------------------------------------------------------------------- merging and converting


@pytest.mark.parametrize("task", ["cedar", "mu"])
@pytest.mark.parametrize("build", [t5, gpt2])
@torch.no_grad()
def test_a_task_is_merged_and_unloaded(build: Build, task: str) -> None:
    model, inputs = new(build, task_type=KINDS[build]), batch(build())
    expected = model(**inputs, tasks=task).logits
    with pp.route(model, task):
        plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(build())
    assert plain.state_dict().keys() == build().state_dict().keys()
    assert relative_error(plain(**inputs).logits, expected) < 1e-5
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks


@torch.no_grad()
def test_merging_is_undone_bit_for_bit_and_serves_no_other_task() -> None:
    model, inputs = new(), batch(llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**inputs, tasks="cedar").logits
    for tasks in (MIXED, None):
        with pp.route(model, tasks), pytest.raises(InputError, match="one task is merged"):
            model.merge_adapter()
    with pp.route(model, "cedar"):
        model.merge_adapter()
        assert relative_error(model(**inputs).logits, expected) < 1e-5
    assert relative_error(model(**inputs).logits, expected) < 1e-5
    with pytest.raises(InputError, match="another task is merged"):
        model(**inputs, tasks="dune")
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, llama()(**inputs).logits)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_a_task_is_converted_to_a_lora(build: Build) -> None:
    model, inputs = new(build, rank=2), batch(build())
    with pp.route(model, "cedar"):
        settings, tensors = peft.convert_to_lora(model, rank=2)
        expected = model(**inputs).logits
    lora = peft.get_peft_model(build(), settings).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    assert relative_error(lora(**inputs).logits, expected) < 1e-5


def test_ia3_is_merged_but_is_no_lora(tmp_path: Path) -> None:
    model, inputs = new(adapter="ia3"), batch(llama())
    expected = model(**inputs, tasks="cedar").logits
    with pp.route(model, "cedar"):
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            peft.convert_to_lora(model, rank=1)
        assert relative_error(model.merge_and_unload()(**inputs).logits, expected) < 1e-5


# -------------------------------------------------------------------- training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [t5, llama])
def test_gradients_are_the_same_with_checkpointing(build: Build, reentrant: bool) -> None:
    inputs, found, blocks = batch(build()), [], []
    for checkpointing in (False, True):
        model = new(build, task_type=KINDS[build]).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls: list[int] = []
        layer = next(m for m in model.modules() if isinstance(m, pp.MHRLinear))
        layer.base_layer.register_forward_hook(lambda *_, c=calls: c.append(1))
        with pp.route(model, "cedar"):
            first = model(**inputs).loss
        with pp.route(model, "amber"):  # open while the blocks of others are recomputed
            (first + 2 * model(**inputs, tasks=MIXED).loss).backward()
        found.append(gradients(model))
        blocks.append(len(calls))
    assert blocks == [2, 4]
    assert_same(found[1], found[0])


def test_a_bare_checkpoint_never_takes_another_route() -> None:
    model = new(stack, task_type=None, target_modules=["up", "down"]).train()
    x = torch.randn(2, 8, requires_grad=True)
    with pp.route(model, "cedar"):
        y = torch.utils.checkpoint.checkpoint(model.base_model.model.up, x, use_reentrant=False)
    with (
        pp.route(model, "dune"),
        pytest.raises(InputError, match="recomputed without its route"),
    ):
        y.sum().backward()


def test_an_int8_base_trains_and_does_not_merge() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base, inputs = llama(), batch(llama())
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    bare = base(**inputs).logits
    model = peft.get_peft_model(base, config()).train()
    shake(model)
    with pp.route(model, None):
        assert torch.equal(model(**inputs).logits, bare)
    model(**inputs, tasks=MIXED).loss.backward()
    assert all(g.isfinite().all() and g.any() for g in gradients(model).values())
    with pp.route(model, "cedar"), pytest.raises(InputError, match="cannot be merged; export"):
        model.merge_and_unload()


class Quantised(nn.Module):
    """A layer that is linear by its widths alone, and keeps its weight as integers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = float(layer.weight.detach().abs().max()) / 127
        weight = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale)


def test_a_layer_that_is_linear_by_its_widths_alone_is_adapted() -> None:
    base, x = stack(bias=False), torch.randn(4, 8)
    base.up, base.down = Quantised(base.up), Quantised(base.down)
    bare = base(x)
    model = peft.get_peft_model(base, config(task_type=None, target_modules=["up", "down"]))
    assert torch.equal(model(x, tasks=MIXED), bare)
    shake(model)
    model(x, tasks=MIXED).sum().backward()
    assert len(gradients(model)) == 6


def rows_of(size: int) -> list[dict[str, Any]]:
    inputs = batch(llama(), size)
    return [
        {**{name: value[i] for name, value in inputs.items()}, "tasks": i % len(TASKS)}
        for i in range(size)
    ]


def trained(folder: Path, model: nn.Module, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2,
        remove_unused_columns=False, report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows_of(16))


def test_the_trainer_saves_adapters_alone_and_resumes(tmp_path: Path) -> None:
    whole, resumed = new(), new()
    trained(tmp_path, whole, gradient_checkpointing=True).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    trained(tmp_path / "again", resumed).train(str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert relative_error(theirs, ours) < 1e-5, name


@torch.no_grad()
def test_tasks_are_added_and_old_ones_stay(tmp_path: Path) -> None:
    model, inputs = new(), batch(llama())
    old, cedar = model(**inputs, tasks=MIXED).logits, model(**inputs, tasks="cedar").logits
    pp.add_tasks(model, ["oak", "pine"], init="cedar")
    assert torch.equal(model(**inputs, tasks=MIXED).logits, old)
    assert torch.equal(model(**inputs, tasks="pine").logits, cedar)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].tasks == [*TASKS, "oak", "pine"]
    assert torch.equal(loaded(**inputs, tasks="oak").logits, cedar)
    for names, message in ((["amber"], "given twice"), (["mu"], "reserved")):
        with pytest.raises(InputError, match=message):
            pp.add_tasks(model, names)
    with pytest.raises(InputError, match="names must be a list of tasks, not the single string"):
        pp.add_tasks(model, "oak")
    with pytest.raises(InputError, match="has no adapter 'other'"):
        pp.add_tasks(model, ["elm"], adapter_name="other")


# -------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(("settings", "message"), [
    ({"tasks": "amber"}, "tasks must be a list of names, not 'amber'"),
    ({"tasks": ["amber", "amber"]}, "given twice"),
    ({"tasks": [], "method": "private", "num_skills": None, "num_heads": None}, "at least one"),
    ({"rank": 0}, "rank must be a positive whole number"),
    ({"num_heads": 5}, "num_heads=5 does not divide"),
    ({"target_modules": ["embed_tokens"]}, "no linear layer 'embed_tokens' to adapt"),
])  # fmt: skip
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        peft.get_peft_model(llama(), config(**settings))


@torch.no_grad()
def test_wrong_calls_are_refused_and_leave_no_route_open() -> None:
    model, inputs = new(), batch(llama())
    for tasks, message in (
        ("elm", "unknown task 'elm'"),
        (["amber", "dune"], "2 tasks were given for a batch of 4"),
        ([-1, 0, 0, 0], "task id -1 is out of range"),
        (torch.rand(4), "must be one whole number per example"),
    ):
        with pytest.raises(InputError, match=message):
            model(**inputs, tasks=tasks)
        with pytest.raises(InputError, match="no task is routed"):
            model(**inputs)
    with (
        pytest.raises(InputError, match=r"3 tasks were given for a batch of 4"),
        pp.route(model, MIXED[:3]),
    ):
        model(**inputs)
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapter of method MHR"):
        pp.route(llama(), "amber").__enter__()


def test_adapters_of_other_kinds_do_not_mix() -> None:
    with pytest.raises(InputError, match=r"carries an inventory of polyroute\.attach"):
        peft.get_peft_model(routed(llama(), num_heads=4).base_model, config())
    adapted = new()
    with pytest.raises(InputError, match=r"carries an adapter of polyroute\.peft: call unload"):
        attach(adapted, MHRConfig(num_skills=4, num_heads=4), TASKS)
    attach(adapted.unload(), MHRConfig(num_skills=4, num_heads=4), TASKS)
    base = llama()
    base.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    with pytest.raises(InputError, match="adapter of another method of PEFT"):
        base.add_adapter(config(target_modules=["q_proj"]), adapter_name="mine")


def test_inventories_that_have_no_form_in_peft_are_refused(tmp_path: Path) -> None:
    blocks = routed(llama(), num_heads=4, granularity="blockwise")
    with pytest.raises(InputError, match="layers of this inventory share routers"):
        write_peft_mhr(blocks, tmp_path)
    dropped = routed(llama(), num_heads=4)
    dropped.set_phase("mu-uncollapsed")
    with pytest.raises(InputError, match="logits were dropped"):
        write_peft_mhr(dropped, tmp_path)
    dropped.set_phase("mu")
    write_peft_mhr(dropped, tmp_path)
    assert read_inventory(llama(), tmp_path).adapter_config.method == "shared"
    with pytest.raises(InputError, match="not the single string 'amber'"):
        read_inventory(llama(), tmp_path, tasks="amber")


def test_only_the_modules_named_after_it_import_peft() -> None:
    import polyroute

    package = Path(polyroute.__file__).parent
    lines = [
        (path.relative_to(package).as_posix(), line)
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
    ]
    found = {name for name, line in lines if re.match(r"\s*(import|from) peft\b", line)}
    assert found == {"peft.py", "peft_layer.py"}
