import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, bert, gpt2, llama, relative_error, routed, stack, t5
from safetensors.torch import load_file
from torch import nn

peft = pytest.importorskip("peft")

Build = Callable[[], nn.Module]
TOLERANCE = 1e-5


def exported_error(build: Build, task: str, folder: Path, **config: Any) -> float:
    """How far PEFT's model of an exported task is from the routed model."""
    model = routed(build(), **config)
    inputs = batch(model.base_model)
    model.export_peft(task, folder)
    loaded = peft.PeftModel.from_pretrained(build(), folder).eval()
    with torch.no_grad():
        expected = model(**inputs, tasks=task).logits
        plain = model(**inputs, tasks="birch").logits
        assert relative_error(plain, expected) > 1e-3
        return relative_error(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("task", ["cedar", "mu"])
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("build", [t5, llama, gpt2, bert])
def test_peft_computes_the_exported_task(
    tmp_path: Path, build: Build, adapter: Any, task: str
) -> None:
    error = exported_error(build, task, tmp_path, num_heads=4, adapter=adapter, rank=2, alpha=3.0)
    assert error < TOLERANCE


@pytest.mark.parametrize("config", [
    {"num_heads": 8},
    {"method": "private", "rank": 3},
    {"method": "poly", "normalization": "l2"},
    {"target_modules": ["q_proj", "k_proj"]},
    {"target_modules": r"model\.layers\.1\..*_proj", "granularity": "blockwise"},
    {"exclude_modules": r"model\.layers\.0\.mlp.*", "granularity": "coarsegrained"},
], ids=str)  # fmt: skip
def test_peft_computes_every_kind_of_inventory(tmp_path: Path, config: dict[str, Any]) -> None:
    assert exported_error(llama, "cedar", tmp_path, **config) < TOLERANCE


def test_a_plain_model_can_be_exported_too(tmp_path: Path) -> None:
    model, x = routed(stack(), num_heads=4), torch.randn(5, 8)
    model.export_peft("dune", tmp_path)
    loaded = peft.PeftModel.from_pretrained(stack(), tmp_path)
    assert relative_error(loaded(x), model(x, tasks="dune")) < TOLERANCE


def test_an_averaged_and_a_shared_model_can_be_exported(tmp_path: Path) -> None:
    shared, averaged = routed(stack(), method="shared"), routed(stack(), num_heads=4)
    averaged.set_phase("mu")
    for name, model in (("shared", shared), ("averaged", averaged)):
        x = torch.randn(5, 8)
        model.export_peft("amber", tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(stack(), tmp_path / name)
        assert relative_error(loaded(x), model(x, tasks="amber")) < TOLERANCE


def test_the_adapter_is_an_ordinary_lora_of_the_same_rank(tmp_path: Path) -> None:
    routed(llama(), num_heads=4, rank=2, alpha=3.0).export_peft("cedar", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"}  # fmt: skip
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["task_type"] == "CAUSAL_LM"
    assert not config["fan_in_fan_out"]
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    prefix = "base_model.model.model.layers.1.self_attn.k_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (2, 32)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (16, 2)


def test_layers_that_endings_cannot_tell_apart_are_named_in_full(tmp_path: Path) -> None:
    routed(llama(), target_modules=r"model\.layers\.1\.mlp\.up_proj").export_peft("amber", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"]


@torch.no_grad()
def test_a_merged_peft_model_equals_a_merged_routed_one(tmp_path: Path) -> None:
    model = routed(gpt2(), num_heads=4)
    model.export_peft("amber", tmp_path)
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path).merge_and_unload()
    model.merge("amber")
    ours = model.unload().state_dict()
    for name, weight in theirs.state_dict().items():
        assert relative_error(ours[name], weight) < TOLERANCE


def test_exporting_changes_nothing(tmp_path: Path) -> None:
    model = routed(t5(), num_heads=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.export_peft("amber", tmp_path)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
