"""Base models whose weights are quantised, or of another precision than in training."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import TASKS, batch, llama, relative_error, routed
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from polyroute import InputError, RoutedModel, from_pretrained
from polyroute.layer.sites import find_sites

ORDER = ["birch", "amber", "dune", "birch"]


class Packed(nn.Parameter):
    """A parameter of a class of its own, as bitsandbytes has them."""


class Linear4bit(nn.Linear):
    """Shaped as bitsandbytes' layer: two numbers in each byte of `weight`, `[d_in * d_out / 2, 1]`.

    The scale is no parameter and no buffer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.quant_state = float(layer.weight.detach().abs().max()) / 7
        whole = (layer.weight.data / self.quant_state).round().add(8).to(torch.uint8).view(-1, 2)
        packed = whole[:, :1] * 16 + whole[:, 1:]
        self.weight = Packed(packed, requires_grad=False)

    def dequantised(self) -> Tensor:
        pairs = torch.cat([self.weight // 16, self.weight % 16], dim=1).float() - 8
        return pairs.view(self.out_features, self.in_features) * self.quant_state

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype))


class Linear8bitLt(nn.Linear):
    """Shaped as bitsandbytes' layer: int8 rows, each with a scale beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        scale = layer.weight.data.abs().amax(1, keepdim=True) / 127
        whole = (layer.weight.data / scale).round().to(torch.int8)
        self.weight = Packed(whole, requires_grad=False)
        self.row_scales = scale

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.row_scales

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype))


class QuantLinear(nn.Module):
    """Shaped as the layers of GPTQ and AWQ: no `weight`, packed integers and scales in buffers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.data.abs().amax(1) / 7
        whole = (layer.weight.data / scales[:, None]).round().add(8).int()
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (whole.T.reshape(-1, 8, self.out_features) << shifts[:, None]).sum(1)
        self.register_buffer("qweight", packed.int())
        self.register_buffer("scales", scales)
        self.bias = None

    def dequantised(self) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        whole = (self.qweight[:, None] >> shifts[:, None]) & 15
        return (whole.reshape(self.in_features, -1) - 8).T.float() * self.scales[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype))


def is_quantised(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, nn.Linear) and "lm_head" not in name


def replaced(base: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and is_quantised(layer, name):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, make(layer))
    return base


def by_torchao(base: nn.Module, config: Any) -> nn.Module:
    quantize_(base, config, filter_fn=is_quantised)
    return base


INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8": lambda base: by_torchao(base, Int8WeightOnlyConfig()),
    "torchao int4": lambda base: by_torchao(base, INT4),
    "Linear4bit": lambda base: replaced(base, Linear4bit),
    "Linear8bitLt": lambda base: replaced(base, Linear8bitLt),
    "QuantLinear": lambda base: replaced(base, QuantLinear),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantised(kind: str) -> nn.Module:
    return KINDS[kind](llama())


@torch.no_grad()
def dequantised(kind: str) -> nn.Module:
    """A plain model of exactly the weights that the quantised one stands for."""
    plain = llama()
    for name, layer in quantised(kind).named_modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "dequantised"):
            plain.get_submodule(name).weight.copy_(layer.dequantised())
        elif isinstance(layer, nn.Linear) and type(weight) is not nn.Parameter:
            plain.get_submodule(name).weight.copy_(weight.dequantize())
    return plain


def step(model: RoutedModel) -> list[Tensor]:
    """The logits of a batch of several tasks, and every gradient."""
    output = model(**batch(llama()), tasks=ORDER)
    output.loss.backward()
    gradients = [p.grad for p in (*model.inventory.parameters(), *model.routes.parameters())]
    assert all(p.grad is None for p in model.base_model.parameters())
    return [output.logits, *gradients]


@every_kind
def test_a_quantised_base_model_trains_as_the_plain_one_that_it_stands_for(kind: str) -> None:
    found = step(routed(quantised(kind), num_heads=4))
    plain = step(routed(dequantised(kind), num_heads=4))
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(found, plain, strict=True))
    unrounded = step(routed(llama(), num_heads=4))
    assert relative_error(found[0], unrounded[0]) > 1e-3


@every_kind
@torch.no_grad()
def test_an_inventory_is_loaded_onto_the_same_model_quantised_or_not(
    kind: str, tmp_path: Path
) -> None:
    model, inputs = routed(quantised(kind), num_heads=4), batch(llama())
    model.save_pretrained(tmp_path / "quantised")
    again = from_pretrained(quantised(kind), tmp_path / "quantised").eval()
    expected = model(**inputs, tasks=ORDER).logits
    assert torch.equal(again(**inputs, tasks=ORDER).logits, expected)
    plain = from_pretrained(llama(), tmp_path / "quantised")
    plain.save_pretrained(tmp_path / "plain")
    from_pretrained(quantised(kind), tmp_path / "plain")
    for saved in ("quantised", "plain"):
        with pytest.raises(InputError, match="belongs to another base model: the weights of par"):
            from_pretrained(KINDS[kind](llama(seed=7)), tmp_path / saved)


@every_kind
@torch.no_grad()
def test_an_exported_task_of_a_quantised_base_computes_the_same_in_peft(
    kind: str, tmp_path: Path
) -> None:
    model, inputs = routed(quantised(kind), num_heads=4), batch(llama())
    model.export_peft("amber", tmp_path)
    base = quantised(kind) if "torchao" in kind else dequantised(kind)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    expected = model(**inputs, tasks="amber").logits
    assert relative_error(theirs(**inputs).logits, expected) < 2e-5


@every_kind
def test_a_quantised_weight_is_not_merged(kind: str) -> None:
    model = routed(quantised(kind), num_heads=4)
    with pytest.raises(InputError, match=r"q_proj' is quantised \(\w+\) and cannot be merged"):
        model.merge("amber")
    assert model.merged_task is None


@every_kind
def test_a_quantised_base_keeps_its_keys_and_is_given_back(kind: str) -> None:
    base = quantised(kind)
    keys, layers = list(base.state_dict()), dict(base.named_modules())
    model = routed(base, num_heads=4)
    assert list(base.state_dict()) == keys
    copied = copy.deepcopy(model)
    assert torch.equal(step(copied)[0], step(model)[0])
    assert dict(model.unload().named_modules()) == layers


def test_a_float8_weight_is_storage_not_values() -> None:
    base = llama()
    layer = base.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"q_proj' is quantised \(Parameter\)"):
        routed(base).merge("amber")


def test_a_packed_layer_computes_in_the_type_of_its_scales() -> None:
    base = quantised("QuantLinear")
    assert {s.dtype for s in find_sites(base, routed(llama()).adapter_config)} == {torch.float32}
    base.half()
    (site, *_) = routed(base).sites
    assert (site.dtype, site.device.type, site.weight) == (torch.float16, "cpu", None)


PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("there", "here"), PAIRS, ids=str)
def test_precision_is_no_other_base_model_but_other_weights_are(
    there: torch.dtype, here: torch.dtype, tmp_path: Path
) -> None:
    routed(llama().to(there)).save_pretrained(tmp_path)
    assert from_pretrained(llama().to(there).to(here), tmp_path).tasks == TASKS
    assert from_pretrained(llama().to(here), tmp_path).tasks == TASKS
    with pytest.raises(InputError, match="belongs to another base model: the weights"):
        from_pretrained(llama(seed=7).to(here), tmp_path)
    tuned = llama()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.03)
    with pytest.raises(
        InputError, match=r"weights of layer 'model\.layers\.1\.mlp\.up_proj' differ"
    ):
        from_pretrained(tuned.to(here), tmp_path)
