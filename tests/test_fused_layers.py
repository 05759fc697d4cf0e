"""The layers of torch.nn.Transformer, whose fused path would go past the adapters."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import routed
from torch import nn

from polyroute import RoutedModel


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


def run(model: RoutedModel, x: torch.Tensor, tasks: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, tasks=tasks, **kwargs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tasks", ["amber", ["amber", "dune", "amber"]])
def test_evaluation_uses_the_adapters_as_training_does(tasks: Any, padded: bool) -> None:
    base, x = encoder(), torch.randn(3, 5, 16)
    real = torch.ones(3, 5, dtype=torch.bool)
    real[1, 3:] = False
    kwargs = {"src_key_padding_mask": ~real} if padded else {}
    with torch.no_grad():
        before = base(x, **kwargs)
    model = routed(base)
    with torch.no_grad():
        model.train()
        expected = run(model, x, tasks, **kwargs)
        model.eval()
    for loaded in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        actual = run(loaded, x, tasks, **kwargs)
        torch.testing.assert_close(actual[real], expected[real])
        assert not torch.allclose(actual[real], before[real], atol=1e-2)
    with model.route(None), torch.no_grad():
        torch.testing.assert_close(model(x, **kwargs)[real], before[real])


def test_unloading_switches_the_fused_path_on_again() -> None:
    base, x = encoder(), torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = base(x, src_key_padding_mask=mask)
        model = routed(base)
        assert not base.use_nested_tensor
        model.merge("amber")
        model.unmerge()
        model.unload()
        assert base.use_nested_tensor
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())
        assert torch.equal(base(x, src_key_padding_mask=mask), before)


def test_a_merged_model_computes_its_task() -> None:
    model, x = routed(encoder()), torch.randn(2, 5, 16)
    expected = run(model, x, "cedar")
    model.merge("cedar")
    torch.testing.assert_close(run(model, x, "cedar"), expected, rtol=1e-4, atol=1e-5)


def test_decoder_layers_use_the_adapters() -> None:
    torch.manual_seed(0)
    base = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    with torch.no_grad():
        before = base(x, memory)
        model = routed(base)
        actual = model(x, memory, tasks=["amber", "dune"])
        model.train()
        torch.testing.assert_close(model(x, memory, tasks=["amber", "dune"]), actual)
    assert not torch.allclose(actual, before, atol=1e-2)
