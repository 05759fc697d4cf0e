"""The same claims for every architecture that docs/models.md lists."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from accelerate import dispatch_model
from models import TASKS, batch, llama, relative_error, routed, rows, stack, t5
from torch import Tensor, nn

from polyroute import InputError, MHRConfig, RoutedModel, attach, from_pretrained

VOCABULARY = 40
ORDER = ["birch", "amber", "dune", "birch"]
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"} | {"num_labels": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "max_position_embeddings": 32, "forced_eos_token_id": None,
    "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "word_embed_proj_dim": 32,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
DEBERTA = {
    **ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
    "position_buckets": 8, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8, "num_labels": 8,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4, "num_labels": 8,
}  # fmt: skip
CONVNEXT = {
    "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 4,
    "num_labels": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model class and a tiny configuration of it."""

    model: Any
    config: Any
    sizes: dict[str, Any]
    exclude: list[str] | None = None
    pixels: int | None = None

    def build(self) -> nn.Module:
        """The same weights every time, large enough that every part of the model matters."""
        torch.manual_seed(0)
        model: nn.Module = self.model(self.config(**self.sizes)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Four examples."""
        torch.manual_seed(1)
        if self.pixels:
            return {"pixel_values": torch.randn(4, 3, self.pixels, self.pixels)}
        ids = torch.randint(3, VOCABULARY, (4, 6))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = ids.flip(1)[:, :4].contiguous()
        return inputs

    @property
    def kind(self) -> str:
        """How it reads and answers, as the end of its class's name tells."""
        ends = {"ForConditionalGeneration": "seq2seq", "Classification": "classifier"}
        name = self.model.__name__
        return next((kind for end, kind in ends.items() if name.endswith(end)), "causal")

    def routed(self) -> RoutedModel:
        return routed(self.build(), num_heads=4, num_skills=3, exclude_modules=self.exclude)


ARCHITECTURES = {
    "T5": Architecture(hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "mT5": Architecture(hf.MT5ForConditionalGeneration, hf.MT5Config, T5),
    "BART": Architecture(hf.BartForConditionalGeneration, hf.BartConfig, BART),
    "Llama": Architecture(hf.LlamaForCausalLM, hf.LlamaConfig, DECODER),
    "Qwen2": Architecture(hf.Qwen2ForCausalLM, hf.Qwen2Config, DECODER),
    "Qwen3": Architecture(hf.Qwen3ForCausalLM, hf.Qwen3Config, {**DECODER, "head_dim": 8}),
    "Mistral": Architecture(hf.MistralForCausalLM, hf.MistralConfig, DECODER),
    "Gemma": Architecture(hf.GemmaForCausalLM, hf.GemmaConfig, {**DECODER, "head_dim": 8}),
    "Gemma 3": Architecture(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**DECODER, "head_dim": 8}),
    "Phi": Architecture(hf.PhiForCausalLM, hf.PhiConfig, DECODER),
    "Phi-3": Architecture(hf.Phi3ForCausalLM, hf.Phi3Config, DECODER),
    "GPT-2": Architecture(hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
    "OPT": Architecture(hf.OPTForCausalLM, hf.OPTConfig, OPT),
    "Mixtral": Architecture(
        hf.MixtralForCausalLM, hf.MixtralConfig, {**DECODER, "num_local_experts": 4}
    ),
    "Qwen2-MoE": Architecture(
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig,
        {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 24},
        exclude=["shared_expert_gate"],
    ),
    "Qwen3-MoE": Architecture(
        hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, {**DECODER, **EXPERTS, "head_dim": 8}
    ),
    "BERT": Architecture(hf.BertForSequenceClassification, hf.BertConfig, ENCODER),
    "ModernBERT": Architecture(
        hf.ModernBertForSequenceClassification, hf.ModernBertConfig, ENCODER
    ),
    "DeBERTa-v2": Architecture(
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config,
        DEBERTA,
        exclude=["query_proj", "key_proj"],
    ),
    "ViT": Architecture(hf.ViTForImageClassification, hf.ViTConfig, VIT, pixels=16),
    "Swin": Architecture(hf.SwinForImageClassification, hf.SwinConfig, SWIN, pixels=32),
    "ConvNeXt": Architecture(
        hf.ConvNextForImageClassification, hf.ConvNextConfig, CONVNEXT, pixels=16
    ),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
GENERATING = [n for n, a in ARCHITECTURES.items() if a.kind != "classifier"]
DECODING = [n for n, a in ARCHITECTURES.items() if a.kind == "causal"]


def double(base: nn.Module) -> nn.Module:
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # the others' kernels are for fp32 and below
    return base.double()


@torch.no_grad()
def merged_by_hand(architecture: Architecture, model: RoutedModel, task: str) -> nn.Module:
    """The base model with alpha/r A B of one task added to its weights, head by head."""
    base, weights = double(architecture.build()), model.weights_of(task).double()
    scale = model.adapter_config.scale
    for i, site in enumerate(model.sites):
        skills = model.inventory.site_tensors(i)
        w = weights[model.mixer.router_of_site[i]]
        a = torch.einsum("hk,hkdr->hdr", w, skills["lora_a"]).flatten(0, 1)
        b = torch.einsum("hk,hkre->rhe", w, skills["lora_b"]).flatten(1)
        weight = base.get_parameter(f"{site.name}.weight")
        weight += scale * (a @ b if site.is_conv1d else (a @ b).T)
    return base


@every_architecture
@torch.no_grad()
def test_a_mixed_batch_computes_each_tasks_own_merged_base_model(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.routed(), architecture.inputs()
    double(model)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    alone = [
        merged_by_hand(architecture, model, task)(**rows(inputs, i)).logits
        for i, task in enumerate(ORDER)
    ]
    expected = torch.cat(alone)
    assert relative_error(model(**inputs, tasks=ORDER).logits, expected) < 1e-5
    assert relative_error(double(architecture.build())(**inputs).logits, expected) > 1e-2


@every_architecture
def test_gradients_reach_every_skill_and_route_and_nothing_of_the_base_model(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.routed()
    model(**architecture.inputs(), tasks=list(TASKS)).logits.square().mean().backward()
    for skills in model.inventory.parameters():
        assert skills.grad is not None
        assert (skills.grad.flatten(3).abs().sum(-1) > 0).all()
    logits = model.routes.logits
    assert logits is not None
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None for p in model.base_model.parameters())


@every_architecture
@torch.no_grad()
def test_a_saved_inventory_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.routed(), architecture.inputs()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(architecture.build(), tmp_path).eval()
    expected = model(**inputs, tasks=ORDER).logits
    assert torch.equal(loaded(**inputs, tasks=ORDER).logits, expected)


@every_architecture
@torch.no_grad()
def test_an_exported_task_computes_the_same_in_peft(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.routed(), architecture.inputs()
    model.export_peft("cedar", tmp_path)
    theirs = peft.PeftModel.from_pretrained(architecture.build(), tmp_path).eval()
    assert relative_error(theirs(**inputs).logits, model(**inputs, tasks="cedar").logits) < 2e-5


@every_architecture
@torch.no_grad()
def test_merging_computes_the_task_and_unmerging_restores_every_bit(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.routed(), architecture.inputs()
    before = {k: v.clone() for k, v in model.base_model.state_dict().items()}
    expected = model(**inputs, tasks="dune").logits
    model.merge("dune")
    assert relative_error(model(**inputs).logits, expected) < 2e-5
    model.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.base_model.state_dict().items())


@pytest.mark.parametrize("name", GENERATING)
def test_generation_for_several_tasks_equals_each_task_alone(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.routed(), architecture.inputs()
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = [model.generate(**rows(inputs, i), tasks=t, **options) for i, t in enumerate(ORDER)]
    assert torch.equal(model.generate(**inputs, tasks=ORDER, **options), torch.cat(alone))


@pytest.mark.parametrize("name", DECODING)
def test_generation_with_a_static_cache_gives_the_same_tokens(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.routed(), architecture.inputs()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "tasks": ORDER}
    static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "Qwen3-MoE"])
def test_fused_experts_and_their_router_are_left_alone(name: str) -> None:
    base = ARCHITECTURES[name].build()
    fused = {n for n, p in base.named_parameters() if p.ndim == 3}
    assert fused
    assert all(".mlp.experts." in n for n in fused)
    sites = [site.name for site in ARCHITECTURES[name].routed().sites]
    assert not [n for n in sites if ".experts." in n or n.endswith(".gate")]


def test_relative_positions_without_a_batch_are_refused_for_several_tasks() -> None:
    architecture = ARCHITECTURES["DeBERTa-v2"]
    model, inputs = routed(architecture.build(), num_heads=4), architecture.inputs()
    with pytest.raises(InputError, match=r"query_proj' got an input of shape \[1, .*exclude_mod"):
        model(**inputs, tasks=ORDER)
    expected = model(**inputs, tasks="cedar").logits
    model.merge("cedar")
    assert relative_error(model(**inputs).logits, expected) < 2e-5


def test_tied_embeddings_are_left_alone_and_stay_tied() -> None:
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)).eval()
    weight = base.get_input_embeddings().weight
    model, inputs = routed(base, num_heads=4), batch(base)
    model(**inputs, tasks=ORDER).loss.backward()
    model.merge("amber")
    assert base.lm_head.weight is base.get_input_embeddings().weight is weight
    assert isinstance(base.lm_head, nn.Linear)
    assert weight.grad is None


PLACES = {
    "with hooks": {"": "cpu"},
    "partly on disk": {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
        "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu",
    },
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_base_model_with_a_device_map_computes_the_same(place: str, tmp_path: Path) -> None:
    expected, inputs = routed(llama(), num_heads=4), batch(llama())
    base = dispatch_model(llama(), PLACES[place], "cpu", offload_dir=tmp_path, force_hooks=True)
    model = routed(base, num_heads=4)
    gradients = []
    for one in (model, expected):
        one(**inputs, tasks=ORDER).loss.backward()
        gradients.append([p.grad for p in (*one.inventory.parameters(), *one.routes.parameters())])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*gradients, strict=True))
    assert model.mixer.device == torch.device("cpu")


def test_an_offloaded_weight_is_not_merged(tmp_path: Path) -> None:
    places = PLACES["partly on disk"]
    model = routed(dispatch_model(llama(), places, "cpu", offload_dir=tmp_path, force_hooks=True))
    with pytest.raises(InputError, match=r"layers\.1\..* is not in memory .*cannot be merged"):
        model.merge("amber")


def test_factors_lie_where_their_layer_does() -> None:
    for config in ({"num_heads": 4}, {"adapter": "ia3"}):
        base = stack()
        base.down.to("meta")
        model = routed(base, **config)
        assert {p.device.type for p in model.inventory.parameters()} == {"cpu"}
        with model.route(["amber", "dune"]):
            factors = model._prepare().factors
        found = [{t.device.type for t in vars(f).values()} for f in factors]
        assert found == [{"cpu"}, {"meta"}, {"cpu"}]


def test_a_model_on_the_meta_device_takes_no_memory_until_it_is_given_some(tmp_path: Path) -> None:
    saved, inputs = routed(t5(), num_heads=4), batch(t5())
    saved.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = t5()
    with pytest.raises(InputError, match="cannot be loaded onto the meta device"):
        from_pretrained(base, tmp_path)
    model = attach(base, MHRConfig(num_heads=4, num_skills=4, alpha=6.0), TASKS)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for use in (
        lambda: model.merge("amber"),
        lambda: model(**inputs, tasks="amber"),
        lambda: model.save_pretrained(tmp_path / "new"),
    ):
        with pytest.raises(InputError, match=r"on the meta device.*to_empty"):
            use()
    model.to_empty(device="cpu")
    model.base_model.load_state_dict(t5().state_dict())
    model.load_adapter(tmp_path)
    with torch.no_grad():
        expected = saved(**inputs, tasks=ORDER).logits
        assert torch.equal(model(**inputs, tasks=ORDER).logits, expected)


def test_the_page_lists_what_is_tested() -> None:
    page = Path(__file__).parent.parent / "docs" / "models.md"
    table = page.read_text().partition("| architecture |")[2].partition("\n\n")[0]
    listed = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[1].startswith("`"):
            name, model, adapted, left_out, answers = cells
            listed[name] = (model.strip("`"), re.findall(r"`(\w+)`", adapted), left_out, answers)
    tested = {}
    for name, architecture in ARCHITECTURES.items():
        endings = sorted({s.name.rsplit(".", 1)[-1] for s in architecture.routed().sites})
        left_out = ", ".join(f"`{ending}`" for ending in architecture.exclude or [])
        answers = "static too" if name in DECODING else "yes" if name in GENERATING else ""
        tested[name] = (architecture.model.__name__, endings, left_out, answers)
    assert listed == tested
