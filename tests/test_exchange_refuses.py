"""What another program's format cannot hold is refused, and nothing is written."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TASKS, llama, routed

from polyroute import InputError, MHRConfig, RoutedModel, attach
from polyroute.exchange import write_inventory

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from token_gate import TokenGate


def gated() -> RoutedModel:
    return attach(llama(), MHRConfig(num_skills=2, num_heads=1), TASKS, rule=TokenGate(top_k=1))


def resized() -> RoutedModel:
    model = routed(llama(), num_heads=2, target_modules=["lm_head"])
    model.resize_token_embeddings(48)
    return model


MADE: dict[str, Any] = {
    "no rule 'token-gate'": gated,
    r"trained beside the skills \(model\.norm\)": lambda: routed(
        llama(), num_heads=2, modules_to_save=["model.norm"]
    ),
    r"combine='output'": lambda: routed(llama(), num_heads=2, combine="output"),
    r"40 of the 48 outputs of layer 'lm_head'": resized,
}


@pytest.mark.parametrize("form", ["mttl", "peft-mhr", "peft-poly"])
@pytest.mark.parametrize("sentence", MADE)
def test_an_inventory_that_a_format_cannot_hold_is_refused(
    sentence: str, form: str, tmp_path: Path
) -> None:
    model = MADE[sentence]()
    if form == "peft-mhr" and "output" in sentence and "40" not in sentence:
        write_inventory(model, tmp_path / "out", form, None)  # whose layers combine as ours do
        return
    with pytest.raises(InputError, match=sentence):
        write_inventory(model, tmp_path / "out", form, None)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_peft_combines_outputs_as_the_inventory_does(tmp_path: Path) -> None:
    from polyroute.exchange import read_inventory

    model = routed(llama(), num_heads=2, rank=2, alpha=5.0, combine="output")
    write_inventory(model, tmp_path / "out", "peft-mhr", None)
    again = read_inventory(llama(), tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids, tasks="cedar").logits
    assert torch.equal(again(input_ids=ids, tasks="cedar").logits, expected)
    peft = pytest.importorskip("peft")
    from polyroute.peft import route

    adapter = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    with route(adapter, "cedar"):
        torch.testing.assert_close(adapter(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
