"""LoRA folders of PEFT: what PEFT computes with them is computed here, whatever their settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, gpt2, llama, relative_error, routed, stack, t5
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from polyroute import InputError
from polyroute.exchange import read_inventory
from polyroute.exchange.lora import from_lora

peft = pytest.importorskip("peft")

Build = Callable[[], nn.Module]
KEY = "base_model.model.model.layers.0.self_attn.q_proj"
PATTERNS = {
    "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 1},
    "alpha_pattern": {r"model\.layers\.0\..*": 7, "q_proj": 3},
}


def written(folder: Path, build: Build = llama, **settings: Any) -> nn.Module:
    """PEFT's model with a LoRA of random weights, which it has saved."""
    settings = {"r": 3, "lora_alpha": 4, "target_modules": "all-linear", **settings}
    torch.manual_seed(5)
    model: nn.Module = peft.get_peft_model(build(), peft.LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def llava() -> nn.Module:
    """A vision-language model whose layers had other names before transformers 5."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text = LlamaConfig(**sizes, vocab_size=64, num_attention_heads=4, initializer_range=0.2)
    vision = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("build", "settings"), [
    (t5, {}),
    (llama, {"use_rslora": True}),
    (llama, PATTERNS),
    (llama, {**PATTERNS, "use_rslora": True}),
    (llama, {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}),
    (llama, {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\..*"}),
    (gpt2, {"fan_in_fan_out": True, "rank_pattern": {"c_attn": 2}}),
], ids=lambda value: getattr(value, "__name__", str(value)))  # fmt: skip
@torch.no_grad()
def test_a_lora_computes_what_it_does_in_peft(
    tmp_path: Path, build: Build, settings: dict[str, Any]
) -> None:
    theirs, inputs = written(tmp_path, build, **settings), batch(build())
    ours = read_inventory(build(), tmp_path, tasks=["mine"])
    expected = theirs(**inputs).logits
    assert relative_error(build()(**inputs).logits, expected) > 1e-3
    assert relative_error(ours(**inputs, tasks="mine").logits, expected) < 1e-5


def renamed(folder: Path, name: Callable[[str], str]) -> None:
    """Give the tensors of an adapter other names."""
    file = folder / "adapter_model.safetensors"
    save_file({name(key): tensor for key, tensor in load_file(file).items()}, file)


@torch.no_grad()
def test_a_lora_of_the_output_layer_comes_with_a_copy_of_it(tmp_path: Path) -> None:
    theirs, inputs = written(tmp_path, target_modules=["q_proj", "lm_head"]), batch(llama())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in saved
    ours = read_inventory(llama(), tmp_path, tasks=["mine"])
    assert relative_error(ours(**inputs, tasks="mine").logits, theirs(**inputs).logits) < 1e-5
    half = llama().bfloat16()
    assert "lm_head" in [site.name for site in read_inventory(half, tmp_path).sites]
    other = llama()
    other.lm_head.weight.mul_(1.01)
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight' with other values than"):
        read_inventory(other, tmp_path)


@torch.no_grad()
def test_keys_may_hold_the_name_of_the_adapter(tmp_path: Path) -> None:
    theirs, inputs = written(tmp_path), batch(llama())
    renamed(tmp_path, lambda key: key.replace(".weight", ".default.weight"))
    ours = read_inventory(llama(), tmp_path, tasks=["mine"])
    assert relative_error(ours(**inputs, tasks="mine").logits, theirs(**inputs).logits) < 1e-5
    renamed(tmp_path, lambda key: key.replace("A.default", "A.french"))
    with pytest.raises(InputError, match=r"several adapters \(default, french\): save each"):
        read_inventory(llama(), tmp_path)


@pytest.mark.parametrize("form", [None, "peft"])
def test_adapters_in_sub_folders_are_named(tmp_path: Path, form: str | None) -> None:
    written(tmp_path / "checkpoint-9")
    written(tmp_path / "checkpoint-8" / "french")
    with pytest.raises(InputError, match=r"one of them \(checkpoint-8/french, checkpoint-9\), or"):
        read_inventory(llama(), tmp_path, form=form)


@torch.no_grad()
def test_names_of_layers_from_older_transformers_are_read_as_in_peft(tmp_path: Path) -> None:
    written(tmp_path, llava, target_modules=r".*language_model.*\.(q|v)_proj")
    now = "base_model.model.model.language_model."
    renamed(tmp_path, lambda key: key.replace(now, "base_model.model.language_model.model."))
    theirs = peft.PeftModel.from_pretrained(llava(), tmp_path).eval()
    ours = read_inventory(llava(), tmp_path, tasks=["mine"])
    inputs = {"input_ids": torch.randint(3, 60, (2, 6))}
    expected = theirs(**inputs).logits
    assert relative_error(llava()(**inputs).logits, expected) > 1e-3
    assert relative_error(ours(**inputs, tasks="mine").logits, expected) < 1e-5


def test_mixed_ranks_are_filled_up_with_zeros(tmp_path: Path) -> None:
    written(tmp_path, **PATTERNS)
    model, saved = from_lora(llama(), tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert model.adapter_config.rank == 5
    for i, site in enumerate(model.sites):
        skill = model.inventory.site_tensors(i)
        a, b = skill["lora_a"][0, 0].t(), skill["lora_b"][0, 0]
        rank = len(saved[f"base_model.model.{site.name}.lora_A.weight"])
        assert torch.equal(a[:rank], saved[f"base_model.model.{site.name}.lora_A.weight"])
        assert a[rank:].count_nonzero() == b[rank:].count_nonzero() == 0


@pytest.mark.parametrize("build", [t5, gpt2])
def test_export_import_and_export_again_keeps_every_bit(tmp_path: Path, build: Build) -> None:
    routed(build(), num_heads=4, rank=3, alpha=2.0).export_peft("cedar", tmp_path / "cedar")
    model = from_lora(build(), tmp_path / "cedar")
    assert model.tasks == ("cedar",)
    model.export_peft("cedar", tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "cedar" / name).read_bytes()


@pytest.mark.parametrize(("settings", "message"), [
    ({"use_dora": True}, "no plain LoRA: its use_dora is True; fold it into the base model"),
    ({"bias": "all"}, "its bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, r"its modules_to_save is \['lm_head'\]"),
    ({"lora_bias": True}, "its lora_bias is True"),
    ({"init_lora_weights": "pissa"}, "its init_lora_weights is 'pissa'"),
    ({"target_modules": ["embed_tokens", "q_proj"]}, "holds '.*embed_tokens.*', which is no part"),
])  # fmt: skip
def test_what_is_more_than_a_low_rank_update_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    written(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        read_inventory(llama(), tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "IA3"}, "PEFT type 'IA3', but 'LORA' is needed"),
    ({"r": 2}, "should have rank 2, and its matrices have 3 and 3"),
    ({"lora_alpha": "four"}, "lora_alpha='four' is not a number"),
    ({"target_modules": ["q_proj", "lm_head"]}, "has no adapter for layer 'lm_head'"),
    ({"target_modules": ["query"]}, "belongs to another base model: target module 'query'"),
    ({"r": "3"}, "should have rank '3', and its matrices have 3 and 3"),
    ({"alpha_pattern": {"(q_proj": 3}}, r"the pattern '\(q_proj' is no regular expression"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_tensors_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    written(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        read_inventory(llama(), tmp_path)


def test_a_lora_that_lacks_a_matrix_and_another_base_model_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(InputError, match="belongs to another base model"):
        from_lora(stack(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[f"{KEY}.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lacks lora_B of layer 'model\.layers\.0\.self_attn"):
        from_lora(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config\.json is damaged: it holds no settings"):
        read_inventory(llama(), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="is no PEFT checkpoint"):
        from_lora(llama(), tmp_path)
