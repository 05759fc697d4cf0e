"""Poly checkpoints: what PEFT writes computes the same here, and PEFT computes what we write."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TASKS, batch, gpt2, llama, relative_error, routed, t5
from safetensors.torch import load_file, save_file
from test_against_peft import IDS, poly_model
from torch import Tensor, nn

from polyroute import InputError, from_pretrained
from polyroute.exchange import read_inventory
from polyroute.exchange.peft_poly import from_peft_poly, write_peft_poly

peft = pytest.importorskip("peft")

Build = Callable[[], nn.Module]
KINDS = {t5: "SEQ_2_SEQ_LM", llama: "CAUSAL_LM"}
each_base = pytest.mark.parametrize("build", [t5, llama])
each_heads = pytest.mark.parametrize("heads", [1, 8])
KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def theirs(folder: Path, build: Build = llama, heads: int = 8) -> nn.Module:
    model = poly_model(build, KINDS[build], heads)
    model.save_pretrained(folder)
    return model


@each_base
@each_heads
@torch.no_grad()
def test_a_checkpoint_of_peft_computes_the_same(tmp_path: Path, build: Build, heads: int) -> None:
    model = theirs(tmp_path / "peft", build, heads)
    read_inventory(build(), tmp_path / "peft", tasks=TASKS).save_pretrained(tmp_path / "ours")
    ours, inputs = from_pretrained(build(), tmp_path / "ours"), batch(build())
    expected = model(**inputs, task_ids=IDS).logits
    assert relative_error(ours(**inputs, tasks=IDS).logits, expected) < 1e-5
    one = model(**inputs, task_ids=torch.full((4,), 1)).logits
    assert relative_error(ours(**inputs, tasks=TASKS[1]).logits, one) < 1e-5
    assert relative_error(one, expected) > 1e-3


@each_base
@each_heads
@pytest.mark.parametrize("alpha", [1.0, 3.0])
@torch.no_grad()
def test_peft_computes_what_is_written(
    tmp_path: Path, build: Build, heads: int, alpha: float
) -> None:
    ours, inputs = routed(build(), num_heads=heads, rank=3, alpha=alpha), batch(build())
    write_peft_poly(ours, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    expected = ours(**inputs, tasks=IDS).logits
    assert relative_error(ours(**inputs, tasks="dune").logits, expected) > 1e-3
    assert relative_error(loaded(**inputs, task_ids=IDS).logits, expected) < 1e-5


@each_heads
def test_a_round_trip_keeps_every_bit(tmp_path: Path, heads: int) -> None:
    theirs(tmp_path / "peft", heads=heads)
    write_peft_poly(from_peft_poly(llama(), tmp_path / "peft"), tmp_path / "again")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    fields, again = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("peft", "again")
    )
    fields["target_modules"].sort()
    counts = ("r", "n_tasks", "n_skills", "n_splits", "poly_type", "target_modules", "task_type")
    assert {name: again[name] for name in counts} == {name: fields[name] for name in counts}


def test_names_stay_with_the_checkpoint_and_can_be_given(tmp_path: Path) -> None:
    write_peft_poly(routed(llama(), num_heads=4), tmp_path)
    assert from_peft_poly(llama(), tmp_path).tasks == TASKS
    assert from_peft_poly(llama(), tmp_path, tasks=list("wxyz")).tasks == ("w", "x", "y", "z")
    (tmp_path / "tasks.json").unlink()
    assert from_peft_poly(llama(), tmp_path).tasks[:2] == ("task-0000", "task-0001")
    with pytest.raises(InputError, match="1 task names were given for the 4 routing rows"):
        from_peft_poly(llama(), tmp_path, tasks=["one"])


@torch.no_grad()
def test_averaged_routing_is_written_as_uniform_rows(tmp_path: Path) -> None:
    ours, inputs = routed(t5(), num_heads=4), batch(t5())
    ours.set_phase("mu-uncollapsed")
    write_peft_poly(ours, tmp_path)
    loaded = peft.PeftModel.from_pretrained(t5(), tmp_path).eval()
    expected = ours(**inputs, tasks="mu").logits
    assert relative_error(loaded(**inputs, task_ids=IDS).logits, expected) < 1e-5


@pytest.mark.parametrize(("build", "config", "sentence"), [
    (llama, {"method": "shared"}, "no method 'shared'"),
    (llama, {"method": "private"}, "private adapters"),
    (llama, {"adapter": "ia3", "num_heads": 4}, r"no \(IA\)\^3"),
    (llama, {"gate": "straight_through"}, "no gate 'straight_through'"),
    (llama, {"normalization": "l2"}, "no normalization 'l2'"),
    (llama, {"shared_skill": True}, "no shared skill"),
    (llama, {"logit_dropout": 0.1}, "no dropout of gates"),
    (llama, {"granularity": "blockwise"}, "layers of this inventory share routers"),
    (gpt2, {}, "is a Conv1D"),
])  # fmt: skip
def test_what_poly_does_not_have_is_not_written(
    tmp_path: Path, build: Build, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        write_peft_poly(routed(build(), **config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_inventory_without_tasks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no inventory without tasks"):
        write_peft_poly(routed(llama(), ()), tmp_path)


# ------------------------------------------------------------------------------- pickles


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_bin_file_is_read_only_where_asked_for(tmp_path: Path) -> None:
    theirs(tmp_path)
    safe = from_peft_poly(llama(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        from_peft_poly(llama(), tmp_path)
    pickled = from_peft_poly(llama(), tmp_path, allow_pickle=True)
    assert torch.equal(safe.routes.logits, pickled.routes.logits)
    torch.save({**tensors, "x": Malicious(tmp_path / "made")}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"not loaded.*mkdir"):
        from_peft_poly(llama(), tmp_path, allow_pickle=True)
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------- wrong input


def without(*parts: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for part in parts:
            del tensors[f"{KEY}.{part}"]

    return edit


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: value})


ROUTER = "poly_router.module_logits"


@pytest.mark.parametrize(("edit", "sentence"), [
    (without("poly_lora_A"), "lacks the tensor 'model.layers.0.self_attn.q_proj.lora_a'"),
    (without(ROUTER), "lacks the routing logits of"),
    (without("poly_lora_A", "poly_lora_B", ROUTER), "no adapter for layer 'model.layers.0"),
    (put(f"{KEY}.poly_lora_B", torch.ones(8, 5, 3, 5)), "but .* is needed"),
    (put(f"{KEY}.{ROUTER}", torch.ones(4, 39)), "but .* is needed"),
    (put(f"{KEY}.{ROUTER}", torch.ones(3, 40)), "n_tasks=4 but another number"),
    (put(f"{KEY}.poly_lora_A", torch.full((8, 5, 4, 3), torch.inf)), "not finite"),
    (put("base_model.model.lm_head.weight", torch.ones(2)), "modules_to_save"),
    (lambda tensors: tensors.clear(), "is not whole"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_one_sentence(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    theirs(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=sentence) as error:
        from_peft_poly(llama(), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"peft_type": "LORA"}, "PEFT type 'LORA', but 'POLY' is needed"),
    ({"n_skills": "5"}, "n_skills must be a positive whole number, not '5'"),
    ({"n_skills": 6}, "but .* is needed"),
    ({"n_splits": 3}, "does not divide"),
    ({"target_modules": ["q_proj", "nonsense"]}, "another base model: target module 'nonsense'"),
])  # fmt: skip
def test_wrong_settings_are_one_sentence(
    tmp_path: Path, fields: dict[str, Any], sentence: str
) -> None:
    theirs(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(InputError, match=sentence):
        from_peft_poly(llama(), tmp_path)


def test_a_truncated_or_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter_config\.json in it"):
        from_peft_poly(llama(), tmp_path)
    theirs(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        from_peft_poly(llama(), tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        from_peft_poly(llama(), tmp_path)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    theirs(tmp_path)
    for other in (t5(), llama(hidden_size=64), llama(layers=1), llama(layers=3)):
        with pytest.raises(InputError, match=r"another base model|check the base model"):
            from_peft_poly(other, tmp_path)
