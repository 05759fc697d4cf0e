"""Inputs that cannot be mistaken: counts of tasks, images, heads, adapters, resized layers."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TASKS, Stack, batch, bert, llama, relative_error, routed, shake, stack, t5
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from polyroute import InputError, MHRConfig, attach, from_pretrained

WRONG = r"2 tasks were given for a batch of 4 examples; give one per example, or a single name"

# ---------------------------------------------------------------- the number of tasks


def whisper() -> nn.Module:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=8, encoder_layers=1, decoder_layers=1, d_model=16,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_source_positions=8, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def wav2vec2() -> nn.Module:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,),
        num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


class Names(nn.Module):
    """A model whose argument has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, measurements: Tensor, order: Tensor | None = None) -> Tensor:
        y: Tensor = self.up(measurements)
        return y


def entrances() -> dict[str, tuple[Any, dict[str, Any]]]:
    ids = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(0))
    sound = torch.randn(4, 8, 16)
    return {
        "input_ids": (llama, {"input_ids": ids}),
        "inputs_embeds": (llama, {"inputs_embeds": torch.randn(4, 5, 32)}),
        "encoder": (bert, {"input_ids": ids}),
        "decoder alone": (
            t5,
            {"decoder_input_ids": ids, "encoder_outputs": (torch.randn(4, 5, 32),)},
        ),
        "input_features": (whisper, {"input_features": sound, "decoder_input_ids": ids}),
        "input_values": (wav2vec2, {"input_values": torch.randn(4, 64)}),
        "pixel_values": (vit, {"pixel_values": torch.randn(4, 1, 8, 8)}),
        "a name of its own": (Names, {"measurements": torch.randn(4, 8), "order": torch.ones(2)}),
    }


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", entrances())
def test_every_input_of_a_forward_has_as_many_examples_as_tasks(
    name: str, positional: bool
) -> None:
    make, inputs = entrances()[name]
    if positional and len(inputs) > 1:
        pytest.skip("one positional argument")
    model = routed(make(), num_heads=2)
    first = next(iter(inputs))
    args = (inputs[first],) if positional and first in ("input_ids", "pixel_values") else ()
    given = {k: v for k, v in inputs.items() if not (args and k == first)}
    with pytest.raises(InputError, match=WRONG):
        model(*args, **given, tasks=["amber", "birch"])
    with pytest.raises(InputError, match=WRONG), model.route(["amber", "birch"]):
        model(*args, **given)
    model(*args, **given, tasks=list(TASKS))
    model(*args, **given, tasks="amber")


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]
)
@pytest.mark.parametrize("name", ["input_ids", "inputs", "inputs_embeds", "positional", "sound"])
def test_generation_has_as_many_prompts_as_tasks(name: str, options: dict[str, Any]) -> None:
    ids = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"max_new_tokens": 2, **options}
    args: tuple[Any, ...] = ()
    if name == "sound":
        model = routed(whisper(), num_heads=2)
        given["input_features"] = torch.randn(4, 8, 16)
    else:
        model = routed(llama(), num_heads=2)
        if name == "positional":
            args = (ids,)
        else:
            given[name] = torch.randn(4, 5, 32) if name == "inputs_embeds" else ids
    with pytest.raises(InputError, match=WRONG):
        model.generate(*args, **given, tasks=["amber", "birch"])
    with pytest.raises(InputError, match=WRONG), model.route(["amber", "birch"]):
        model.generate(*args, **given)
    rows = 4 * options.get("num_return_sequences", 1)
    assert len(model.generate(*args, **given, tasks=list(TASKS))) == rows


def test_the_bridge_to_peft_counts_tasks_at_every_entrance() -> None:
    peft = pytest.importorskip("peft")
    from polyroute import peft as pp

    for make, inputs in (
        (llama, {"input_ids": torch.randint(3, 40, (4, 5))}),
        (
            whisper,
            {"input_features": torch.randn(4, 8, 16), "decoder_input_ids": torch.ones(4, 2).long()},
        ),
    ):
        config = pp.MHRConfig(tasks=["amber", "birch"], num_heads=2, num_skills=2)
        model = peft.get_peft_model(make(), config).eval()
        two = ["amber", "birch"]
        with pytest.raises(InputError, match=WRONG):
            model(**inputs, tasks=two)
        with pytest.raises(InputError, match=WRONG), pp.route(model, two):
            model(**inputs)
        prompts = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        for options in ({}, {"num_beams": 2}):
            with pytest.raises(InputError, match=WRONG), pp.route(model, two):
                model.generate(**prompts, max_new_tokens=2, **options)
            with pp.route(model, two * 2):
                assert len(model.generate(**prompts, max_new_tokens=2, **options)) == 4
        with pp.route(model, two * 2):
            model(**inputs)


# ---------------------------------------------------------------- images and sounds

IMAGE = 63


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=8, patch_size=4, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def qwen2_vl() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 2,
            "spatial_merge_size": 1, "temporal_patch_size": 1, "in_channels": 1, "mlp_ratio": 1,
        },
        image_token_id=IMAGE, video_token_id=62, vision_start_token_id=60, vision_end_token_id=61,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).eval()


def with_images(counts: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (len(counts), 20), generator=generator)
    for row, count in zip(ids, counts, strict=True):
        row[: 4 * count] = IMAGE
    pixels = torch.randn(sum(counts), 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def with_patches(sizes: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Images of a height and width in patches, several for each example."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (len(sizes), 24), generator=generator)
    for row, images in zip(ids, sizes, strict=True):
        at = 0
        for height, width in images:
            row[at] = 60
            row[at + 1 : at + 1 + height * width] = IMAGE
            at += height * width + 2
            row[at - 1] = 61
    grid = torch.tensor([(1, h, w) for images in sizes for h, w in images])
    pixels = torch.randn(int(grid.prod(1).sum()), 4, generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {**found, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


def test_all_linear_adapts_the_language_part_of_a_vision_language_model() -> None:
    for make, tower in ((llava, "vision_tower"), (qwen2_vl, "visual")):
        model = routed(make(), num_heads=2)
        assert all("language_model" in site.name for site in model.sites)
        assert len(model.sites) == 14
        asked = routed(make(), num_heads=2, target_modules=rf".*{tower}.*(fc1|q_proj|qkv)")
        assert all(site.sees_media for site in asked.sites)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 0, 1, 1], [3, 1, 2, 2], [2, 1, 1, 1]])
def test_any_number_of_images_is_routed_where_the_language_part_is_adapted(
    counts: list[int],
) -> None:
    model, tasks = routed(llava(), num_heads=2), ["amber", "birch", "birch", "amber"]
    inputs, at = with_images(counts), 0
    together = model(**inputs, tasks=tasks).logits
    for i, count in enumerate(counts):
        alone = {k: v[i : i + 1] for k, v in inputs.items() if k != "pixel_values"}
        if count:
            alone["pixel_values"] = inputs["pixel_values"][at : at + count]
        at += count
        assert relative_error(model(**alone, tasks=tasks[i]).logits[0], together[i]) < 1e-5


EVERYWHERE = r".*(q_proj|fc1|fc2|linear_1|qkv|mlp.*proj)"


@pytest.mark.parametrize("counts", [[2, 0, 1, 1], [3, 1, 2, 2], [2, 1, 1, 1], [0, 0, 2, 2]])
def test_an_adapted_tower_refuses_images_that_do_not_show_whose_they_are(
    counts: list[int],
) -> None:
    model = routed(llava(), num_heads=2, target_modules=EVERYWHERE)
    inputs = with_images(counts)
    with pytest.raises(InputError, match="does not show which example each belongs to"):
        model(**inputs, tasks=list(TASKS))
    model(**inputs, tasks="amber")
    model(**inputs, tasks=["amber"] * 4)
    with pytest.raises(InputError, match="does not show which example each belongs to"):
        model.generate(**inputs, tasks=list(TASKS), max_new_tokens=2)


@pytest.mark.parametrize("each", [1, 2])
def test_an_adapted_tower_routes_images_of_which_each_example_has_as_many(each: int) -> None:
    model = routed(llava(), num_heads=2, target_modules=EVERYWHERE)
    assert {site.sees_media for site in model.sites} == {True, False}
    inputs = with_images([each] * 4)
    together = model(**inputs, tasks=list(TASKS)).logits
    for i, task in enumerate(TASKS):
        alone = {k: v[i : i + 1] for k, v in inputs.items()}
        alone["pixel_values"] = inputs["pixel_values"][each * i : each * (i + 1)]
        assert relative_error(model(**alone, tasks=task).logits[0], together[i]) < 1e-5
    options = {"max_new_tokens": 3, "do_sample": False}
    beams = model.generate(**inputs, tasks=list(TASKS), num_beams=2, **options)
    for i, task in enumerate(TASKS):
        alone = {k: v[i : i + 1] for k, v in inputs.items()}
        alone["pixel_values"] = inputs["pixel_values"][each * i : each * (i + 1)]
        own = model.generate(**alone, tasks=task, num_beams=2, **options)[0]
        assert torch.equal(own, beams[i, : len(own)])


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ([[(2, 2)], [(2, 2)]], True),
        ([[(2, 2), (2, 2)], [(2, 2), (2, 2)]], True),
        ([[(2, 4)], [(4, 2)]], False),  # as many patches, of another shape
        ([[(2, 2), (2, 2)], [(2, 4)]], False),  # as many patches, of other images
        ([[(2, 2)], [(2, 4)]], False),
        ([[(2, 2), (2, 2)], []], False),
    ],
)
def test_flattened_patches_are_routed_only_where_they_are_alike(sizes: Any, fits: bool) -> None:
    model = routed(qwen2_vl(), num_heads=2, target_modules=EVERYWHERE)
    assert {site.sees_media for site in model.sites} == {True, False}
    inputs, tasks = with_patches(sizes), ["amber", "birch"]
    if not fits:
        with pytest.raises(InputError, match="does not show which example each belongs to"):
            model(**inputs, tasks=tasks)
        return
    together = model(**inputs, tasks=tasks).logits
    for i, task in enumerate(tasks):
        alone = with_patches([sizes[i]])
        alone["input_ids"] = inputs["input_ids"][i : i + 1]
        count = len(inputs["pixel_values"]) // 2
        alone["pixel_values"] = inputs["pixel_values"][count * i : count * (i + 1)]
        assert relative_error(model(**alone, tasks=task).logits[0], together[i]) < 1e-5


def test_a_tower_called_alone_refuses_a_batch_of_several_tasks() -> None:
    model = routed(llava(), num_heads=2, target_modules=EVERYWHERE)
    pixels = torch.randn(4, 3, 8, 8)
    with model.route(list(TASKS)), pytest.raises(InputError, match="does not show which example"):
        model.get_image_features(pixel_values=pixels)
    with model.route("amber"):
        model.get_image_features(pixel_values=pixels)


# ---------------------------------------------------------------- outside the adapted layers


def classifier(seed: int) -> nn.Module:
    """BERT with its encoder as always and a random head."""
    model = bert()
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight)
    return model


def test_another_random_head_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    model = routed(classifier(1), num_heads=4, target_modules=["query", "value"])
    model.save_pretrained(tmp_path)
    from_pretrained(classifier(1), tmp_path)
    with pytest.raises(InputError, match=r"weights of parameter 'classifier\.weight' differ"):
        from_pretrained(classifier(2), tmp_path)
    for name, parameter in classifier(1).named_parameters():
        if parameter.abs().sum() == 0 or any(f"{part}." in name for part in ("query", "value")):
            continue
        other = classifier(1)
        with torch.no_grad():
            other.get_parameter(name).add_(0.01)
        with pytest.raises(InputError, match=f"'{name}' differ"):
            from_pretrained(other, tmp_path)
    from_pretrained(classifier(2), tmp_path, check_base=False)


def test_what_trains_outside_the_inventory_is_named_when_it_is_saved(tmp_path: Path) -> None:
    model = routed(classifier(1), num_heads=4, target_modules=["query"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    model.base_model.classifier.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"2 parameters .* not saved .*classifier\.weight.*modules_"
    ):
        model.save_pretrained(tmp_path)
    model.base_model.classifier.requires_grad_(False)
    with torch.no_grad():
        model.base_model.bert.pooler.dense.weight.mul_(1.5)
    with pytest.warns(UserWarning, match=r"1 parameters .*bert\.pooler\.dense\.weight; name their"):
        model.save_pretrained(tmp_path)


# ---------------------------------------------------------------- attach: all or nothing


def on_peft(method: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = {
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"]),
        "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "poly": peft.PolyConfig(r=2, target_modules=["q_proj"], n_tasks=2, n_skills=2),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }[method]
    found: nn.Module = peft.get_peft_model(llama(), config)
    return found


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"], ["o_proj"]])
@pytest.mark.parametrize("method", ["lora", "ia3", "poly", "prompt"])
def test_a_model_that_carries_an_adapter_is_refused_and_left_alone(
    method: str, targets: Any
) -> None:
    model = on_peft(method)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(InputError, match=r"Peft.* of peft, an adapter already: merge it"):
        attach(model, MHRConfig(num_skills=2, num_heads=2, target_modules=targets), ["a"])
    inner = model.get_base_model()
    if method != "prompt":  # which changes nothing inside
        with pytest.raises(InputError, match=r"layer '.*q_proj.*' is a .* of peft, an adapter"):
            attach(inner, MHRConfig(num_skills=2, num_heads=2, target_modules=targets), ["a"])
    assert before == {n: (id(m), type(m)) for n, m in model.named_modules()}
    assert grads == {n: p.requires_grad for n, p in model.named_parameters()}


def test_transformers_own_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(
        InputError, match=r"'model\.layers\.0\.self_attn\.v_proj' is a Linear of peft"
    ):
        attach(model, MHRConfig(num_skills=2, num_heads=2, target_modules=["q_proj"]), ["a"])


class Adapter(nn.Module):
    """A layer such as loralib's, from wherever."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(2, 8))


def test_layers_with_factors_of_other_libraries_are_refused() -> None:
    base = stack()
    base.more = Adapter()
    with pytest.raises(InputError, match="layer 'more' is a Adapter, an adapter already"):
        attach(base, MHRConfig(num_skills=2, num_heads=2), ["a"])


@pytest.mark.parametrize("step", ["put", "_freeze", "_stop_fusion"])
def test_an_attach_that_fails_halfway_leaves_the_model_as_it_was(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyroute.layer.wrapping import Wrapping

    base = stack()
    base.up.weight.requires_grad_(False)
    before = {n: (id(m), type(m)) for n, m in base.named_modules()}
    count = iter(range(100))
    original = getattr(Wrapping, step)

    def fail(self: Wrapping, *args: Any, **kwargs: Any) -> Any:
        if next(count) == (1 if step == "put" else 0):
            raise ZeroDivisionError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Wrapping, step, fail)
    with pytest.raises(ZeroDivisionError):
        attach(base, MHRConfig(num_skills=2, num_heads=2), ["a"])
    monkeypatch.undo()
    assert before == {n: (id(m), type(m)) for n, m in base.named_modules()}
    grads = {n: p.requires_grad for n, p in base.named_parameters()}
    assert grads == {n: n != "up.weight" for n in grads}
    attach(base, MHRConfig(num_skills=2, num_heads=2), ["a"])


# ---------------------------------------------------------------- layers that stand for others


def tied(is_tied: bool) -> nn.Module:
    torch.manual_seed(0)
    base = llama()
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    return type(base)(config).eval()


@pytest.mark.parametrize("size", [48, 36])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*parameters of the base model trained or changed")
def test_the_vocabulary_is_resized_under_an_adapted_head(
    is_tied: bool, heads: int, size: int, tmp_path: Path
) -> None:
    model = routed(tied(is_tied), num_heads=heads, alpha=9.0, target_modules=["q_proj", "lm_head"])
    ids = batch(model.base_model)["input_ids"].clamp(max=35)
    before = model(input_ids=ids, tasks=list(TASKS)).logits
    model.resize_token_embeddings(size)
    assert not any(p.requires_grad for p in model.base_model.parameters())
    after = model(input_ids=ids, tasks=list(TASKS)).logits
    kept = min(size, 40)
    assert after.shape[-1] == size
    assert relative_error(after[..., :kept], before[..., :kept]) < 1e-6
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head).__name__ == "RoutedLayer"
    assert (head.weight is embedding.weight) == is_tied
    loss = model(input_ids=ids, labels=ids, tasks=list(TASKS)).loss
    loss.backward()
    if size > 40:  # new tokens have the output of the base model
        with model.route(None):
            bare = model(input_ids=ids).logits
        hidden = model.base_model.model
        with model.route("amber"):
            states = hidden(input_ids=ids).last_hidden_state
        new = states @ head.base_layer.weight[40:].t()
        assert relative_error(model(input_ids=ids, tasks="amber").logits[..., 40:], new) < 1e-5
        assert bare.shape == after.shape
    if is_tied:
        return  # a tied weight cannot be merged
    model.merge("birch")
    assert relative_error(model(input_ids=ids).logits[1], after[1]) < 1e-5
    model.unmerge()
    model.save_pretrained(tmp_path)
    fresh = tied(is_tied)
    fresh.resize_token_embeddings(size)
    fresh.load_state_dict(model.base_model.state_dict())
    again = from_pretrained(fresh, tmp_path)
    assert torch.equal(again(input_ids=ids, tasks=list(TASKS)).logits, after)
    with pytest.raises(InputError, match="belongs to another base model"):
        from_pretrained(tied(is_tied), tmp_path)


def test_a_resize_that_fails_leaves_the_head_wrapped() -> None:
    model = routed(llama(), num_heads=2, target_modules=["lm_head"])
    before = model.get_output_embeddings()
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        model.resize_token_embeddings(-5)
    assert model.get_output_embeddings() is before


def test_weights_are_tied_through_a_wrapped_layer() -> None:
    model = routed(tied(True), num_heads=2, target_modules=["lm_head"])
    model.base_model.tie_weights()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.base_layer.weight is embedding.weight
    new = nn.Parameter(torch.randn_like(embedding.weight))
    head.weight = new
    assert head.base_layer.weight is new
    assert "weight" not in head._parameters


def test_a_state_dict_with_other_tasks_or_another_order_is_refused() -> None:
    model = routed(stack(), ("a", "b", "c"), num_heads=2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tasks in (("b", "a", "c"), ("a", "b", "d")):
        other = routed(stack(), tasks, num_heads=2, seed=5)
        kept = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(InputError, match="other tasks than this model, or the same in another"):
            other.load_state_dict(state)
        now = other.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())
    same = routed(stack(), ("a", "b", "c"), num_heads=2, seed=5)
    assert str(same.load_state_dict(state)) == "<All keys matched successfully>"
    del state["routes.tasks"]  # of a version before this
    assert str(same.load_state_dict(state)) == "<All keys matched successfully>"
    x = torch.randn(2, 8)
    assert torch.equal(same(x, tasks=["c", "a"]), model(x, tasks=["c", "a"]))


# ---------------------------------------------------------------- float64


@pytest.mark.parametrize("make", [lambda: stack().double(), stack])
def test_a_float64_model_computes_its_routes_in_float64(make: Any) -> None:
    torch.manual_seed(0)
    base: Stack = make()
    model = shake(attach(base, MHRConfig(num_skills=3, num_heads=2, rank=2, alpha=5.0), TASKS))
    model = model.double()
    x = torch.randn(4, 8, dtype=torch.float64)
    rows = model.routes.logits
    assert rows.dtype == model.weights_of("amber").dtype == torch.float64
    gates = torch.sigmoid(rows.detach()[0].view(3, 2, 3))
    assert torch.equal(model.weights_of("amber"), model.mixer.weights_from(model.routes["amber"]))
    torch.testing.assert_close(
        model.weights_of("amber"), gates / gates.sum(-1, keepdim=True), rtol=1e-14, atol=0
    )
    assert torch.autograd.gradcheck(
        lambda _, *__: model(x, tasks=list(TASKS)), (rows, *model.inventory.parameters())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_an_adapter_of_zeros_changes_no_bit(dtype: torch.dtype) -> None:
    base = stack().to(dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = attach(base, MHRConfig(num_skills=3, num_heads=2), TASKS)
    model.merge("amber")
    assert all(torch.equal(tensor, base.state_dict()[n]) for n, tensor in before.items())


def test_float64_merging_is_exact_to_float64() -> None:
    model = routed(stack().double(), num_heads=2, alpha=7.0)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x, tasks="dune")
    model.merge("dune")
    assert relative_error(model(x), expected) < 1e-14


# ---------------------------------------------------------------- more entrances


class Dictionaries(nn.Module):
    """A model that takes its batch as one dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, batch: Any) -> Tensor:
        y: Tensor = self.up(batch["x"] if isinstance(batch, dict) else batch[0])
        return y


@pytest.mark.parametrize("inputs", [{"x": torch.ones(4, 8)}, (torch.ones(4, 8), torch.ones(3))])
def test_a_batch_in_one_argument_is_counted(inputs: Any) -> None:
    model = routed(Dictionaries(), num_heads=2)
    with pytest.raises(InputError, match=WRONG):
        model(inputs, tasks=["amber", "birch"])
    model(inputs, tasks=list(TASKS))


def test_the_order_of_keywords_does_not_decide_what_the_batch_is() -> None:
    model = routed(Names(), num_heads=2)
    with pytest.raises(InputError, match=WRONG):
        model(order=torch.ones(2), measurements=torch.randn(4, 8), tasks=["amber", "birch"])
    model(order=torch.ones(2), measurements=torch.randn(4, 8), tasks=list(TASKS))


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model_counts_tasks(whole: bool) -> None:
    torch._dynamo.reset()
    model: Any = routed(llama(layers=1), num_heads=2)
    ids = torch.randint(3, 40, (4, 5))
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(InputError, match=WRONG):
        model(input_ids=ids, tasks=["amber", "birch"])
    model(input_ids=ids, tasks=list(TASKS))


def test_encoder_outputs_are_counted_by_generation_too() -> None:
    model = routed(t5(), num_heads=2)
    ids = torch.randint(3, 40, (4, 5))
    with model.route(list(TASKS)):
        outputs = model.get_encoder()(input_ids=ids)
    for given in (outputs, tuple(outputs.values())):
        with pytest.raises(InputError, match=WRONG):
            model(encoder_outputs=given, decoder_input_ids=ids, tasks=["amber", "birch"])
    with pytest.raises(InputError, match=WRONG):
        model.generate(encoder_outputs=outputs, max_new_tokens=2, tasks=["amber", "birch"])
    model.generate(encoder_outputs=outputs, max_new_tokens=2, tasks=list(TASKS))


def test_the_base_model_and_its_parts_count_tasks_in_a_block() -> None:
    ids, two = torch.randint(3, 40, (4, 5)), ["amber", "birch"]
    model, encoder = routed(llama(), num_heads=2), routed(t5(), num_heads=2)
    calls: list[Any] = [
        lambda: model.base_model(ids),
        lambda: model.base_model(input_ids=ids),
        lambda: model.base_model.generate(ids, max_new_tokens=2),
        lambda: model.base_model.generate(ids, max_new_tokens=2, num_beams=2),
        lambda: model.model(input_ids=ids),
    ]
    for call in calls:
        with model.route(two), pytest.raises(InputError, match="2 tasks were given"):
            call()
        with model.route(list(TASKS)):
            call()
    with encoder.route(two), pytest.raises(InputError, match="2 tasks were given"):
        encoder.get_encoder()(input_ids=ids)
    with encoder.route(list(TASKS)):
        encoder.get_encoder()(input_ids=ids)


def test_packed_rows_are_not_taken_for_single_examples() -> None:
    model = routed(llama(), num_heads=2)
    ids = torch.randint(3, 40, (1, 8))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(InputError, match=r"1 tasks were given for 2 examples in 1 packed rows"):
        model(input_ids=ids, position_ids=positions, tasks=["amber"])
    model(input_ids=ids, position_ids=positions, tasks="amber")
    padded = torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    model(input_ids=ids, position_ids=padded, attention_mask=mask, tasks=["amber"])


def test_packed_rows_attend_to_their_own_example_without_being_asked() -> None:
    model = routed(llama(), num_heads=2)
    ids = torch.randint(3, 40, (1, 8))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    together = model(input_ids=ids, position_ids=positions, tasks=["amber", "dune"]).logits
    for part, task in ((slice(0, 5), "amber"), (slice(5, 8), "dune")):
        alone = model(input_ids=ids[:, part], tasks=task).logits
        assert relative_error(together[:, part], alone) < 1e-5


@pytest.mark.parametrize("segments", ["ab", [4, 4], [[4.5, 3.5]], [["4", "4"]], [[True, 7]], 8])
def test_segments_of_another_form_are_refused(segments: Any) -> None:
    model = routed(llama(), num_heads=2)
    with pytest.raises(InputError, match="segments must be a list of lengths for each"):
        model(input_ids=torch.ones(1, 8).long(), tasks=["amber", "birch"], segments=segments)


# ---------------------------------------------------------------- more of what is lost in silence


def test_a_trained_bias_or_weight_of_an_adapted_layer_is_named_and_noticed(tmp_path: Path) -> None:
    for kind in ("bias", "weight"):
        model = routed(stack(), num_heads=2)
        with torch.no_grad():
            getattr(model.base_model.up.base_layer, kind).add_(0.5)
        with pytest.warns(UserWarning, match=rf"up\.{kind}"):
            model.save_pretrained(tmp_path / kind)
        with pytest.raises(InputError, match=r"belongs to another base model.*up"):
            from_pretrained(stack(), tmp_path / kind)


def test_statistics_of_batch_norms_are_named_and_noticed(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    model = attach(net().train(), MHRConfig(num_heads=2, num_skills=2), TASKS)
    model(torch.randn(6, 4), tasks="amber")
    with pytest.warns(UserWarning, match=r"1\.running_mean, 1\.running_var"):
        model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"1\.running_mean' differ"):
        from_pretrained(net(), tmp_path)


def test_a_change_of_a_few_rows_of_an_embedding_is_named_and_noticed(tmp_path: Path) -> None:
    model = routed(llama(), num_heads=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[7].add_(0.3)
    with pytest.warns(UserWarning, match=r"model\.embed_tokens\.weight"):
        model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight' differ"):
        from_pretrained(llama(), tmp_path)


def test_layers_and_parameters_that_came_after_attach_are_named(tmp_path: Path) -> None:
    model = routed(classifier(1), num_heads=4, target_modules=["query", "classifier"])
    model.base_model.classifier = nn.Linear(32, 8)
    model.base_model.extra = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"extra\.weight.*classifier|classifier.*extra\.weight"):
        model.save_pretrained(tmp_path)
    new = model.base_model.classifier
    assert model.unload().classifier is new


# ---------------------------------------------------------------- more layers that stand for others


@pytest.mark.filterwarnings("ignore:.*parameters of the base model trained or changed")
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_base_model_itself_resizes_its_vocabulary(is_tied: bool) -> None:
    base = tied(is_tied)
    model = routed(base, num_heads=2, target_modules=["q_proj", "lm_head"])
    ids = batch(base)["input_ids"]
    before = model(input_ids=ids, tasks=list(TASKS)).logits
    base.resize_token_embeddings(48)
    after = model(input_ids=ids, tasks=list(TASKS)).logits
    assert after.shape[-1] == 48
    assert relative_error(after[..., :40], before) < 1e-6
    plain = model.unload()
    assert plain.lm_head.weight.shape[0] == 48
    plain.resize_token_embeddings(40)
    assert "generate" not in vars(plain)
    assert "resize_token_embeddings" not in vars(plain)


def test_a_merged_model_neither_gives_nor_takes_a_state_dict() -> None:
    model = routed(stack(), num_heads=2)
    state = model.state_dict()
    model.merge("amber")
    with pytest.raises(InputError, match=r"merged with 'amber'; call unmerge\(\) first"):
        model.state_dict()
    with pytest.raises(InputError, match=r"merged with 'amber'; call unmerge\(\) first"):
        model.load_state_dict(state)
    assert model.base_model.state_dict()


def test_attributes_of_a_linear_layer_are_set_on_the_base_layer() -> None:
    model = routed(stack(), num_heads=2)
    layer = model.base_model.up
    layer.bias = None
    assert layer.base_layer.bias is None
    layer.out_features = 16
    assert "out_features" not in vars(layer)
    model(torch.randn(2, 8), tasks="amber")


def test_a_weight_that_is_computed_cannot_be_merged() -> None:
    base = stack()
    nn.utils.parametrizations.weight_norm(base.up)
    model = routed(base, num_heads=2)
    with pytest.raises(InputError, match=r"'up' .*cannot be merged"):
        model.merge("amber")


# ---------------------------------------------------------------- more images and sounds


def qwen2_audio() -> nn.Module:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 4, "encoder_layers": 1, "encoder_attention_heads": 2, "d_model": 16,
            "encoder_ffn_dim": 16, "max_source_positions": 4,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        audio_token_index=IMAGE,
    )  # fmt: skip
    return Qwen2AudioForConditionalGeneration(config).eval()


def test_any_number_of_sounds_is_routed_where_the_language_part_is_adapted() -> None:
    model = routed(qwen2_audio(), num_heads=2)
    assert all("language_model" in site.name for site in model.sites)
    ids = torch.randint(3, 60, (2, 12))
    sounds = torch.randn(3, 4, 8)
    for row, count in zip(ids, (2, 1), strict=True):
        row[: 2 * count] = IMAGE
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": sounds,
        "feature_attention_mask": torch.ones(3, 8).long(),
    }
    together = model(**given, tasks=["amber", "birch"]).logits
    for i, part in enumerate((slice(0, 2), slice(2, 3))):
        alone = {k: v[part] if len(v) == 3 else v[i : i + 1] for k, v in given.items()}
        task = ["amber", "birch"][i]
        assert relative_error(model(**alone, tasks=task).logits[0], together[i]) < 1e-5
    tower = routed(qwen2_audio(), num_heads=2, target_modules=r".*(q_proj|fc1)")
    with pytest.raises(InputError, match="does not show which example each belongs to"):
        tower(**given, tasks=["amber", "birch"])


def test_the_bridge_to_peft_adapts_the_language_part_and_refuses_ragged_images() -> None:
    peft = pytest.importorskip("peft")
    from polyroute import peft as pp

    two = ["amber", "birch"]
    config = pp.MHRConfig(tasks=two, num_heads=2, num_skills=2)
    model = peft.get_peft_model(llava(), config).eval()
    adapted = [n for n, m in model.named_modules() if isinstance(m, pp.MHRLinear)]
    assert adapted
    assert all("language_model" in name for name in adapted)
    model(**with_images([2, 0]), tasks=two)
    config = pp.MHRConfig(tasks=two, num_heads=2, num_skills=2, target_modules=EVERYWHERE)
    model = peft.get_peft_model(llava(), config).eval()
    with pytest.raises(InputError, match="does not show which example each belongs to"):
        model(**with_images([2, 0]), tasks=two)
    model(**with_images([1, 1]), tasks=two)
    model(**with_images([2, 0]), tasks="amber")


def test_towers_of_a_model_inside_a_model_are_found() -> None:
    from transformers import ColQwen2Config, ColQwen2ForRetrieval

    torch.manual_seed(0)
    base = ColQwen2ForRetrieval(ColQwen2Config(vlm_config=qwen2_vl().config, embedding_dim=8))
    model = routed(base.eval(), num_heads=2)
    assert not any("visual" in site.name for site in model.sites)


def test_guidance_that_doubles_the_batch_is_refused_for_several_tasks() -> None:
    model = routed(t5(), num_heads=2)
    ids = torch.randint(3, 40, (4, 5))
    with pytest.raises(InputError, match="guidance_scale"):
        model.generate(ids, tasks=list(TASKS), guidance_scale=3.0, max_new_tokens=2)
