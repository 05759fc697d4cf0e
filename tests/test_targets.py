from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import bert, gpt2, llama, routed, stack, t5
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from polyroute import InputError, MHRConfig, RoutedModel, attach
from polyroute.layer.fingerprint import fits_sample
from polyroute.layer.granularity import router_of, routers_of
from polyroute.layer.sites import find_sites

# T5 v1.1: d_model, d_ff, layers of each half, heads (of width 64).
SIZES = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}


def meta_t5(size: str) -> nn.Module:
    d_model, d_ff, layers, heads = SIZES[size]
    config = T5Config(
        d_model=d_model,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        d_kv=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def xl() -> nn.Module:
    return meta_t5("xl")


def attached(base: nn.Module, tasks: int, **config: Any) -> RoutedModel:
    """Attach for the test and take the base out again, as it was, so that it can be shared."""
    model = attach(base, MHRConfig(**config), [f"task{i}" for i in range(tasks)])
    model.unload()
    return model


def test_t5_xl_has_the_published_number_of_layers(xl: nn.Module) -> None:
    sites = find_sites(xl, MHRConfig())
    assert len(sites) == 432
    assert len(find_sites(xl, MHRConfig(target_modules=["q", "k", "v", "o"]))) == 288
    assert len(find_sites(xl, MHRConfig(target_modules=["k", "v", "wi_1"]))) == 192
    assert sum(s.d_in + s.d_out for s in sites) == 2_211_840


@pytest.mark.parametrize(
    ("heads", "row", "table"),
    [
        (1, 3_456, 1_081_728),
        (8, 27_648, 313 * 27_648),
        (16, 55_296, 313 * 55_296),
        (32, 110_592, 313 * 110_592),
        (64, 221_184, 69_230_592),
    ],
)
def test_mhr_on_t5_xl_has_the_published_counts(
    xl: nn.Module, heads: int, row: int, table: int
) -> None:
    model = attached(xl, 313, num_heads=heads, rank=1)
    counts = {k: v for k, v in model.counts().items() if k != "base"}
    assert counts == {
        "inventory": 17_694_720,
        "routing_table": table,
        "one_adapter": 2_211_840,
        "new_task_z": row,
        "new_task_full": 17_694_720 + row,
    }
    assert sum(p.numel() for p in model.inventory.parameters()) == counts["inventory"]
    assert sum(p.numel() for p in model.routes.parameters()) == table


@pytest.mark.parametrize(
    ("tasks", "config", "count"),
    [
        (1, {"method": "shared", "rank": 1}, 2_211_840),
        (1, {"method": "shared", "rank": 16}, 35_389_440),
        (38, {"method": "private", "rank": 1}, 84_049_920),
        (
            1,
            {"method": "shared", "adapter": "ia3", "target_modules": ["k", "v", "wi_1"]},
            540_672,
        ),
        (
            1,
            {"method": "poly", "adapter": "ia3", "target_modules": ["k", "v", "wi_1"]},
            8 * 540_672,
        ),
    ],
    ids=["lora", "lora-big", "adaptersoup", "ia3", "poly-ia3"],
)
def test_the_other_adapters_on_t5_xl_have_the_published_counts(
    xl: nn.Module, tasks: int, config: dict[str, Any], count: int
) -> None:
    assert attached(xl, tasks, **config).counts()["inventory"] == count


@pytest.mark.parametrize(
    ("size", "sites", "lora", "ia3"),
    [
        ("small", 144, 159_744, 34_816),
        ("base", 216, 423_936, 104_448),
        ("large", 432, 1_142_784, 282_624),
        ("xxl", 432, 4_423_680, 1_081_344),
    ],
)
def test_the_other_sizes_of_t5_have_the_published_counts(
    size: str, sites: int, lora: int, ia3: int
) -> None:
    base = meta_t5(size)
    model = attached(base, 1, num_heads=64, rank=1)
    assert len(model.sites) == sites
    assert model.counts()["one_adapter"] == lora
    assert model.counts()["inventory"] == 8 * lora
    few = attached(base, 1, adapter="ia3", method="shared", target_modules=["k", "v", "wi_1"])
    assert few.counts()["one_adapter"] == ia3


@pytest.mark.parametrize(
    ("heads", "row", "table"), [(1, 2_304, 2_016_000), (64, 147_456, 129_024_000)]
)
def test_superni_on_t5_large_has_the_published_counts(heads: int, row: int, table: int) -> None:
    model = attached(
        meta_t5("large"), 875, num_heads=heads, rank=16, target_modules=["q", "k", "v", "o"]
    )
    counts = model.counts()
    assert counts["one_adapter"] == 9_437_184
    assert counts["inventory"] == 75_497_472
    assert (counts["new_task_z"], counts["routing_table"]) == (row, table)


@pytest.mark.parametrize(
    ("granularity", "routers"),
    [("finegrained", 432), ("layerwise", 120), ("blockwise", 48), ("coderwise", 2),
     ("coarsegrained", 1)],
)  # fmt: skip
def test_granularities_have_the_published_number_of_routers(
    xl: nn.Module, granularity: Any, routers: int
) -> None:
    model = attached(xl, 2, granularity=granularity, num_heads=4)
    assert len(model.routers) == routers
    assert model.counts()["new_task_z"] == routers * 4 * 8


@pytest.mark.parametrize(
    ("name", "layerwise", "blockwise"),
    [
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3.layer.0", "encoder.block.3"),
        ("model.layers.12.self_attn.q_proj", "model.layers.12.self_attn", "model.layers.12"),
        ("model.layers.12.mlp.up_proj", "model.layers.12.mlp", "model.layers.12"),
        ("transformer.h.3.attn.c_attn", "transformer.h.3.attn", "transformer.h.3"),
        ("bert.encoder.layer.1.output.dense", "bert.encoder.layer.1.output",
         "bert.encoder.layer.1"),
    ],
)  # fmt: skip
def test_names_of_known_families_are_grouped_by_part_and_block(
    name: str, layerwise: str, blockwise: str
) -> None:
    assert router_of(name, "layerwise") == layerwise
    assert router_of(name, "blockwise") == blockwise
    assert router_of(name, "finegrained") == name


def test_blocks_of_llama_and_gpt2_have_routers_of_their_own() -> None:
    for base, first in ((llama(), "model.layers.0"), (gpt2(), "transformer.h.0")):
        names = [s.name for s in find_sites(base, MHRConfig(num_heads=4))]
        routers, by_site = routers_of(names, "blockwise")
        assert routers == [first, first[:-1] + "1"]
        assert by_site == [0] * (len(names) // 2) + [1] * (len(names) // 2)


def test_a_function_may_group_the_layers() -> None:
    model = routed(stack(), granularity=lambda name: "middle" if name == "down" else "ends")
    assert model.routers == ["ends", "middle"]
    assert model.mixer.router_of_site == (0, 1, 0)


def test_layers_that_share_a_router_share_their_weights_and_others_do_not() -> None:
    model = routed(t5(), granularity="blockwise", num_heads=4)
    tensors = [model.inventory.site_tensors(i)["lora_a"] for i in range(2)]
    weights = model.weights_of("amber")
    for factors, skills in zip(model.factors_of("amber")[:2], tensors, strict=True):
        mixed = torch.einsum("hk,hkdr->rhd", weights[0], skills).flatten(1)
        torch.testing.assert_close(factors.a, mixed)
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("granularity", ["blockwise", "layerwise"])
def test_a_granularity_that_fits_no_name_is_refused(granularity: Any) -> None:
    with pytest.raises(InputError, match="needs a numbered block in the name of layer 'up'"):
        routed(stack(), granularity=granularity)
    with pytest.raises(InputError, match="needs an encoder or decoder in the name"):
        routed(llama(), granularity="coderwise")


@pytest.mark.parametrize(
    ("build", "endings"),
    [
        (t5, {"q": 6, "k": 6, "v": 6, "o": 6, "wi_0": 4, "wi_1": 4, "wo": 4}),
        (llama, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 2, "up_proj": 2,
                 "down_proj": 2}),
        (gpt2, {"c_attn": 2, "c_proj": 4, "c_fc": 2}),
    ],
)  # fmt: skip
def test_all_linear_takes_every_linear_layer_but_the_output_embedding(
    build: Callable[[], nn.Module], endings: dict[str, int]
) -> None:
    sites = find_sites(build(), MHRConfig(num_heads=4))
    assert Counter(s.name.rsplit(".", 1)[-1] for s in sites) == endings


def test_conv1d_widths_are_read_as_stored() -> None:
    (site,) = find_sites(gpt2(), MHRConfig(target_modules=r"transformer\.h\.0\.attn\.c_attn"))
    assert (site.d_in, site.d_out, site.is_conv1d) == (32, 96, True)


def test_targets_are_endings_or_a_regular_expression_over_full_names() -> None:
    by_ending = find_sites(t5(), MHRConfig(target_modules=["q", "EncDecAttention.v"]))
    by_regex = find_sites(t5(), MHRConfig(target_modules=r".*\.(q|EncDecAttention\.v)"))
    assert [s.name for s in by_ending] == [s.name for s in by_regex]
    assert len(by_ending) == 8


def test_excluded_layers_are_left_out() -> None:
    sites = find_sites(t5(), MHRConfig(exclude_modules=r"decoder\..*"))
    assert {s.name.split(".")[0] for s in sites} == {"encoder"}
    sites = find_sites(llama(), MHRConfig(exclude_modules=["q_proj"]))
    assert not any("q_proj" in s.name for s in sites)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "xyz"}, "target_modules='xyz' matches no layer of T5.*end in 'k'"),
        ({"target_modules": ["q", "wi_3"]}, "'wi_3' matches no layer.*did you mean 'wi_"),
        ({"target_modules": "q("}, "no regular expression"),
        ({"target_modules": r".*\.final_layer_norm"}, "which cannot be adapted"),
        ({"exclude_modules": ".*"}, "matches no layer"),
        ({"exclude_modules": "zzz"}, "excluded module 'zzz' matches no layer of T5"),
        ({"exclude_modules": ["q", "wi_3"]}, "excluded module 'wi_3' .*did you mean 'wi_"),
        ({"exclude_modules": "q("}, "no regular expression"),
        ({"num_heads": 7}, "num_heads=7 does not divide the input width 32 of layer 'encoder.blo"),
        ({"num_heads": 32}, "num_heads=32 does not divide the output width 48 of layer 'enc.*wi_0"),
    ],
    ids=str,
)
def test_targets_that_cannot_be_adapted_are_refused(config: dict[str, Any], message: str) -> None:
    base = t5()
    with pytest.raises(InputError, match=message):
        attach(base, MHRConfig(**config), ["amber"])
    assert all(p.requires_grad for p in base.parameters())


def test_heads_need_to_divide_only_the_output_for_ia3() -> None:
    base = nn.Sequential(nn.Linear(6, 8))
    assert find_sites(base, MHRConfig(adapter="ia3", num_heads=8))
    with pytest.raises(InputError, match="input width 6 of layer '0'"):
        find_sites(base, MHRConfig(num_heads=8))


def test_children_of_multihead_attention_are_refused() -> None:
    base = nn.TransformerEncoderLayer(16, 2, 16)
    names = [s.name for s in find_sites(base, MHRConfig(num_heads=4))]
    assert names == ["linear1", "linear2"]
    with pytest.raises(InputError, match=r"out_proj' is a .* inside nn\.MultiheadAttention"):
        find_sites(base, MHRConfig(target_modules=["out_proj"]))


def test_a_layer_registered_twice_is_one_site_at_both_places() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base.add_module("2", base[0])
    model, x = routed(base), torch.randn(3, 8)
    assert [(s.name, s.places) for s in model.sites] == [("0", ("0", "2")), ("1", ("1",))]
    assert base[0] is base[2] is model.routed_layers[0]
    assert torch.isfinite(model(x, tasks="amber")).all()


def test_the_output_head_of_a_classifier_is_an_ordinary_layer() -> None:
    assert "classifier" in [s.name for s in find_sites(bert(), MHRConfig())]


def test_a_layer_without_weights_yet_is_refused() -> None:
    base = nn.Sequential(nn.LazyLinear(8))
    for sites in (None, ["0"]):
        with pytest.raises(InputError, match="layer '0' is a LazyLinear without weights yet: run"):
            attach(base, MHRConfig(), ["amber"], sites=sites)


def test_a_weight_whose_size_fp32_cannot_count_is_sampled() -> None:
    weight = torch.ones(1).expand(4096 * 11008)
    assert fits_sample(weight, [1.0] * 8, "torch.float32")
    assert not fits_sample(weight, [1.0] * 7 + [1.001], "torch.float32")
    assert fits_sample(weight, [1.0] * 7 + [1.001], "torch.bfloat16")
    assert fits_sample(weight, [1.0] * 7 + [1.001], None)
