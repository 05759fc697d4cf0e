"""Exported tasks as servers take them: a folder for each adapter, or one full model."""

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, llama, relative_error, routed, t5
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, ByT5Tokenizer

from polyroute.saved.runs import open_run, record

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve_with_vllm.py"
SERVED = ("amber", "cedar", "dune")
REFUSED_BY_VLLM = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora",
    "use_qalora", "modules_to_save", "trainable_token_indices",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the example printed for a run on a tiny Llama."""
    place = tmp_path_factory.mktemp("served")
    llama().save_pretrained(place / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(place / "base")
    run = open_run(place / "run", "train", resume=False, overwrite=False)
    record(run, "train", {"model": str(place / "base")})
    routed(llama(), num_heads=4, rank=9, alpha=3.0).save_pretrained(run)
    main = runpy.run_path(str(EXAMPLE))["main"]
    return shlex.split(main(str(run), str(place / "out"), *SERVED))


def folders(command: list[str]) -> dict[str, Path]:
    named = command[command.index("--lora-modules") + 1 :]
    return {name: Path(path) for name, path in (item.split("=") for item in named)}


def test_the_command_serves_every_task_at_a_rank_that_vllm_has(command: list[str]) -> None:
    assert command[:2] == ["vllm", "serve"]
    assert (Path(command[2]) / "config.json").is_file()
    assert "--enable-lora" in command
    assert command[command.index("--max-lora-rank") + 1] == "16"
    assert tuple(folders(command)) == SERVED


def test_the_folders_are_in_the_form_that_vllm_reads(command: list[str]) -> None:
    for folder in folders(command).values():
        fields: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        assert fields["peft_type"] == "LORA"
        assert fields["r"] == fields["lora_alpha"] == 9  # a scale of one, whatever a server does
        assert fields["bias"] == "none"
        assert not any(fields.get(name) for name in REFUSED_BY_VLLM)
        tensors = load_file(folder / "adapter_model.safetensors")
        names = {key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in tensors}
        assert {name.rsplit(".", 1)[-1] for name in names} == set(fields["target_modules"])
        linear = {n for n, m in llama().named_modules() if isinstance(m, nn.Linear)}
        assert names == linear - {"lm_head"}
        for key, tensor in tensors.items():
            assert key.endswith((".lora_A.weight", ".lora_B.weight"))
            assert tensor.shape[0 if ".lora_A." in key else 1] == 9


@torch.no_grad()
def test_a_batch_over_three_adapters_in_peft_is_the_routed_batch(command: list[str]) -> None:
    peft = pytest.importorskip("peft")
    places = folders(command)
    first, *others = places
    model = peft.PeftModel.from_pretrained(llama(), places[first], adapter_name=first).eval()
    for name in others:
        model.load_adapter(places[name], adapter_name=name)
    ours, inputs = routed(llama(), num_heads=4, rank=9, alpha=3.0), batch(llama())
    tasks = ["cedar", "amber", "dune", "cedar"]
    expected = ours(**inputs, tasks=tasks).logits
    assert relative_error(ours(**inputs, tasks="amber").logits, expected) > 1e-3
    assert relative_error(model(**inputs, adapter_names=tasks).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("build", "auto"), [(llama, AutoModelForCausalLM), (t5, AutoModelForSeq2SeqLM)]
)
@torch.no_grad()
def test_a_merged_task_is_saved_as_an_ordinary_model(tmp_path: Path, build: Any, auto: Any) -> None:
    model, inputs = routed(build(), num_heads=4), batch(build())
    expected = model(**inputs, tasks="cedar").logits
    model.merge("cedar")
    plain = model.unload()
    plain.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    build().save_pretrained(tmp_path / "base")
    assert keys == load_file(tmp_path / "base" / "model.safetensors").keys()
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert relative_error(loaded.eval()(**inputs).logits, expected) < 1e-5
