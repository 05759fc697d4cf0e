"""Files of version 0.1.0 load bit for bit; `fixtures/saved-0.1.0` holds them and their outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from polyroute import InputError, RoutedModel, from_pretrained
from polyroute.saved.checkpoint import read_checkpoint

SAVED = Path(__file__).parent / "fixtures" / "saved-0.1.0"
VARIANTS = ("mhr", "poly", "private", "shared", "ia3", "l2")
EXPECTED = load_file(SAVED / "expected.safetensors")


def loaded(variant: str) -> RoutedModel:
    base = LlamaForCausalLM.from_pretrained(SAVED / "base").eval()
    return from_pretrained(base, SAVED / variant).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_loads_bit_for_bit(variant: str) -> None:
    model, saved = loaded(variant), read_checkpoint(SAVED / variant)
    assert model.tasks == saved.tasks == ("boolq", "mnli/1", "söze")
    here = {
        f"{site.name}.{factor}": tensor
        for i, site in enumerate(model.sites)
        for factor, tensor in model.inventory.site_tensors(i).items()
    }
    assert here.keys() == saved.skills.keys()
    for name, tensor in saved.skills.items():
        assert torch.equal(here[name], tensor), name
    rows = saved.rows(saved.tasks)
    assert (rows is None) == (model.routes.logits is None)
    if rows is not None:
        assert torch.equal(model.routes.logits, rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_task_computes_what_it_computed(variant: str) -> None:
    model = loaded(variant)
    with torch.no_grad():
        routed = model(input_ids=EXPECTED["input_ids"], tasks=["söze", "boolq", "mnli/1"]).logits
        average = model(input_ids=EXPECTED["input_ids"], tasks="mu").logits
    torch.testing.assert_close(routed, EXPECTED[variant], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average, EXPECTED[f"{variant}.mu"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_again_loads_again(variant: str, tmp_path: Path) -> None:
    model = loaded(variant)
    model.save_pretrained(tmp_path)
    before, after = read_checkpoint(SAVED / variant), read_checkpoint(tmp_path)
    assert before.tasks == after.tasks
    for name, tensor in before.skills.items():
        assert torch.equal(after.skills[name], tensor), name


def test_an_adapter_of_peft_loads_and_computes_what_it_computed() -> None:
    pytest.importorskip("peft")
    from peft import PeftModel

    from polyroute.peft import route

    base = LlamaForCausalLM.from_pretrained(SAVED / "base").eval()
    model = PeftModel.from_pretrained(base, SAVED / "peft-mhr").eval()
    with torch.no_grad(), route(model, ["söze", "boolq", "mnli/1"]):
        routed = model(input_ids=EXPECTED["input_ids"]).logits
    torch.testing.assert_close(routed, EXPECTED["ia3"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", ["", "config"])
def test_an_entry_that_only_a_newer_version_knows_is_named(tmp_path: Path, inside: str) -> None:
    folder = Path(shutil.copytree(SAVED / "mhr", tmp_path / "newer"))
    path = folder / "polyroute.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    (description[inside] if inside else description)["warp"] = 9
    path.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(InputError, match="'warp'"):
        read_checkpoint(folder)
