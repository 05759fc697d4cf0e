"""Checkpoints of mttl: files made by hand here must compute what their formulas say."""

import argparse
import copy
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import batch, llama, relative_error, routed, stack, t5
from safetensors.torch import load_file
from tiny_runs import TRAIN_TASKS, write_suite
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from polyroute import InputError, RoutedModel, from_pretrained
from polyroute.exchange import read_inventory
from polyroute.exchange.mttl import from_mttl
from polyroute.exchange.mttl_export import write_mttl
from polyroute.program.cli.app import main

MODULES = ".*SelfAttention|.*EncDecAttention|.*DenseReluDense"
LAYERS = "q|k|v|o|wi_0|wi_1|wo"
T, K, R = 4, 3, 2
Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(base: nn.Module) -> dict[str, nn.Linear]:
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    return {name: layer for name, layer in layers.items() if name != "lm_head"}


def camera_ready(
    base: nn.Module, heads: int = 4, granularity: str = "finegrained", **hyper: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors in the layout of the paper's code."""
    state: dict[str, Tensor] = {}
    groups: set[str] = set()
    for i, (name, layer) in enumerate(linear(base).items()):
        d_in, d_out = layer.in_features, layer.out_features
        state[f"model.{name}.lora_a"] = drawn(heads, K, d_in // heads, R, seed=2 * i) * 0.1
        state[f"model.{name}.lora_b"] = drawn(heads, K, R, d_out // heads, seed=2 * i + 1) * 0.1
        if (group := group_of(name, granularity)) not in groups:
            groups.add(group)
            state[f"model.{name}.selector.module_logits"] = drawn(T, heads * K, seed=99 + i) * 3
        state[f"model.{name}.layer.weight"] = layer.weight.detach().clone()
    settings = {
        "model": "google/t5-xl-lm-adapt", "model_modifier": "poly", "lora_rank": R,
        "lora_alpha": 3.0, "n_skills": K, "n_splits": heads, "n_tasks": T,
        "router_selector": "poly", "router_granularity": granularity,
        "module_logits_relaxed_bernoulli": False, "modify_modules": MODULES,
        "modify_layers": LAYERS, "learning_rate": 1e-3,
    }  # fmt: skip
    return {**settings, **hyper}, state


def group_of(name: str, granularity: str) -> str:
    """The router of a layer of T5."""
    parts = name.split(".")  # encoder, block, 0, layer, 1, DenseReluDense, wo
    ends = {"coarsegrained": 0, "coderwise": 1, "blockwise": 3, "layerwise": 5, "finegrained": 9}
    return ".".join(parts[: ends[granularity]])


def as_main(hyper: dict[str, Any], state: dict[str, Tensor]) -> None:
    """The same in the layout of the main branch, in place."""
    for key in list(state):
        tensor = state.pop(key)
        if key.endswith("lora_a"):
            key, tensor = key.replace("lora_a", "experts.lora_a"), tensor.permute(1, 0, 2, 3)
        elif key.endswith("lora_b"):
            key, tensor = key.replace("lora_b", "experts.lora_b"), tensor.permute(1, 2, 0, 3)
        elif key.endswith("logits"):
            tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
        state[key] = tensor.contiguous()
    hyper |= {"model_modifier": None, "router_granularity": "*", "router_selector": "poly_router"}


def as_old(hyper: dict[str, Any], state: dict[str, Tensor]) -> None:
    """The settings under their former names, in place; the scale was 1/r."""
    for new, old in (
        ("modify_modules", "lora_modules"), ("modify_layers", "lora_layers"),
        ("router_selector", "poly_selector"), ("router_granularity", "poly_granularity"),
    ):  # fmt: skip
        hyper[old] = hyper.pop(new)
    hyper |= {"model_modifier": "poly_lora", "lora_randb_init": False}
    del hyper["lora_alpha"]


def saved(folder: Path, hyper: Any, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "best.ckpt"
    rest = {"epoch": 3, "global_step": 100, "callbacks": {}, "loops": {"done": True}}
    torch.save({"hyper_parameters": hyper, "state_dict": OrderedDict(state), **rest}, path)
    return path


Weights = Callable[[str], Tensor]


@torch.no_grad()
def by_hand(
    base: nn.Module, state: dict[str, Tensor], weights: Weights, scale: float, inputs: Any
) -> Tensor:
    """Logits of the base model with every adapter folded in, by the loops of `reference`."""
    plain = copy.deepcopy(base)
    for name, layer in linear(plain).items():
        w = weights(name).double()
        a = reference.mix(state[f"model.{name}.lora_a"].double(), w, axis=0)
        b = reference.mix(state[f"model.{name}.lora_b"].double(), w, axis=1)
        layer.weight += scale * (a @ b).T
    logits: Tensor = plain(**inputs).logits
    return logits


def router_weights(state: dict[str, Tensor], task: int, heads: int, granularity: str) -> Weights:
    tables = {
        group_of(key.removeprefix("model.").removesuffix(".selector.module_logits"), granularity): t
        for key, t in state.items()
        if key.endswith("module_logits")
    }
    return lambda name: reference.weights(
        tables[group_of(name, granularity)][task].double().view(heads, K)
    )


@torch.no_grad()
def largest_error(model: RoutedModel, expected: Callable[[int, Any], Tensor]) -> float:
    """Over all tasks, which must differ."""
    inputs = batch(model.base_model)
    wanted = [expected(task, inputs) for task in range(T)]
    assert relative_error(wanted[0], wanted[1]) > 1e-3
    return max(relative_error(model(**inputs, tasks=i).logits, w) for i, w in enumerate(wanted))


# ------------------------------------------------------------------------------- what is imported


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layout", ["camera", "old", "main"])
def test_every_layout_computes_what_its_formulas_say(
    tmp_path: Path, layout: str, heads: int
) -> None:
    base = t5().double()
    hyper, state = camera_ready(base, heads)
    source = dict(state)
    {"camera": lambda *_: None, "old": as_old, "main": as_main}[layout](hyper, state)
    model = from_mttl(t5().double(), saved(tmp_path, hyper, state), allow_pickle=True)
    scale = (1.0 if layout == "old" else 3.0) / R

    def expected(task: int, inputs: Any) -> Tensor:
        weights = router_weights(source, task, heads, "finegrained")
        return by_hand(base, source, weights, scale, inputs)

    assert model.tasks == ("task-0000", "task-0001", "task-0002", "task-0003")
    assert model.adapter_config.method == ("mhr" if heads > 1 else "poly")
    assert largest_error(model, expected) < 1e-6


@pytest.mark.parametrize("granularity", ["layerwise", "blockwise", "coderwise", "coarsegrained"])
def test_a_shared_router_is_that_of_the_first_layer_of_its_group(
    tmp_path: Path, granularity: str
) -> None:
    base = t5().double()
    hyper, state = camera_ready(base, granularity=granularity)
    model = from_mttl(t5().double(), saved(tmp_path, hyper, state), allow_pickle=True)

    def expected(task: int, inputs: Any) -> Tensor:
        return by_hand(base, state, router_weights(state, task, 4, granularity), 3 / R, inputs)

    assert model.adapter_config.granularity == granularity
    assert largest_error(model, expected) < 1e-6


def test_where_names_lack_the_mark_of_a_group_mttl_has_one_router_for_all(tmp_path: Path) -> None:
    hyper, state = camera_ready(
        llama(), modify_modules=".*self_attn|.*mlp", modify_layers=".*_proj"
    )
    first, *others = [key for key in state if key.endswith("module_logits")]
    for key in others:
        del state[key]
    hyper["router_granularity"] = "blockwise"
    model = from_mttl(llama(), saved(tmp_path, hyper, state), allow_pickle=True)
    assert (len(model.routers), model.adapter_config.granularity) == (1, "coarsegrained")
    assert torch.equal(model.routes[1].flatten(), state[first][1])


@pytest.mark.parametrize("constant", [False, True])
def test_without_logits_every_task_takes_the_average(tmp_path: Path, constant: bool) -> None:
    base = t5().double()
    hyper, state = camera_ready(base)
    for key in [key for key in state if key.endswith("module_logits")]:
        if constant:
            state[key] = torch.full((4, K), 1 / K)  # what older code saved
        else:
            del state[key]
    model = from_mttl(t5().double(), saved(tmp_path, hyper, state), allow_pickle=True)
    inputs = batch(base)
    expected = by_hand(base, state, lambda _: reference.uniform(4, K), 3 / R, inputs)
    assert len(model.tasks) == T
    for task in ("task-0003", "mu"):
        assert relative_error(model(**inputs, tasks=task).logits, expected) < 1e-6


def plain(base: nn.Module, adapter: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    for i, (name, layer) in enumerate(linear(base).items()):
        if adapter == "ia3":
            state[f"model.{name}.multi_lora_b"] = 1 + drawn(layer.out_features, seed=i) * 0.5
        else:
            state[f"model.{name}.lora_a"] = drawn(layer.in_features, R, seed=2 * i) * 0.1
            state[f"model.{name}.lora_b"] = drawn(R, layer.out_features, seed=2 * i + 1) * 0.1
    hyper = {"model_modifier": adapter, "modify_modules": MODULES, "modify_layers": LAYERS}
    return hyper | ({} if adapter == "ia3" else {"lora_rank": R, "lora_alpha": 3.0}), state


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@torch.no_grad()
def test_a_plain_adapter_becomes_a_shared_one(tmp_path: Path, adapter: str) -> None:
    base = t5().double()
    hyper, state = plain(base, adapter)
    model = from_mttl(t5().double(), saved(tmp_path, hyper, state), allow_pickle=True)
    for name, layer in linear(base).items():
        if adapter == "ia3":
            layer.weight *= state[f"model.{name}.multi_lora_b"].double()[:, None]
        else:
            a, b = (state[f"model.{name}.lora_{c}"].double() for c in "ab")
            layer.weight += 3 / R * (a @ b).T
    inputs = batch(base)
    assert model.adapter_config.method == "shared"
    assert relative_error(model(**inputs).logits, base(**inputs).logits) < 1e-6


@pytest.mark.parametrize(("setting", "ours"), [
    ({"module_logits_l2_norm": True, "module_logits_relaxed_bernoulli": True},
     {"normalization": "l2", "gate": "sigmoid"}),
    ({"module_logits_relaxed_bernoulli": True}, {"gate": "relaxed_bernoulli"}),
    ({"module_logits_straight_through": True}, {"gate": "straight_through"}),
    ({"poly_average_correction": True}, {"normalization": "average_correction"}),
    ({"poly_use_shared_skill": True}, {"shared_skill": True}),
    ({"module_logits_dropout": 0.25}, {"logit_dropout": 0.25}),
], ids=str)  # fmt: skip
def test_settings_of_the_gates_come_along_both_ways(
    tmp_path: Path, setting: dict[str, Any], ours: dict[str, Any]
) -> None:
    path = saved(tmp_path, *camera_ready(t5(), **setting))
    model = from_mttl(t5(), path, allow_pickle=True)
    assert {name: getattr(model.adapter_config, name) for name in ours} == ours
    write_mttl(model, tmp_path / "out")
    again = from_mttl(t5(), tmp_path / "out")
    assert again.adapter_config == model.adapter_config


def test_names_are_those_of_the_rows_in_order(tmp_path: Path) -> None:
    path = saved(tmp_path, *camera_ready(t5()))
    names = ["a/None/x", "a/b/x", "c", "d"]
    model = from_mttl(t5(), path, tasks=names, allow_pickle=True)
    assert model.tasks == tuple(names)
    with pytest.raises(InputError, match="3 task names were given for the 4 routing rows"):
        from_mttl(t5(), path, tasks=names[:3], allow_pickle=True)


# ------------------------------------------------------------------------------- and written again


@pytest.mark.parametrize(("granularity", "heads", "place"), [
    ("finegrained", 1, "folder"), ("finegrained", 4, "file.ckpt"), ("blockwise", 4, "folder"),
    ("coarsegrained", 1, "file.ckpt"),
])  # fmt: skip
def test_a_round_trip_keeps_every_bit(
    tmp_path: Path, granularity: str, heads: int, place: str
) -> None:
    hyper, state = camera_ready(t5(), heads, granularity)
    first = from_mttl(t5(), saved(tmp_path, hyper, state), allow_pickle=True)
    first.save_pretrained(tmp_path / "ours")
    write_mttl(from_pretrained(t5(), tmp_path / "ours"), tmp_path / place)
    again, settings = read(tmp_path / place)
    expected = {k: v for k, v in state.items() if not k.endswith(".weight")}
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    same = hyper.keys() - {"model", "learning_rate", "modify_modules", "modify_layers"}
    assert {name: settings[name] for name in same} == {name: hyper[name] for name in same}
    assert sorted(settings["modify_modules"].split("|")) == sorted(MODULES.split("|"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix == ".ckpt":
        value = torch.load(path, weights_only=True)
        return value["state_dict"], value["hyper_parameters"]
    settings = json.loads((path / "hyper_parameters.json").read_text())
    return load_file(path / "state_dict.safetensors"), settings


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_a_plain_adapter_is_written_as_it_was(tmp_path: Path, adapter: str) -> None:
    hyper, state = plain(t5(), adapter)
    model = from_mttl(t5(), saved(tmp_path, hyper, state), allow_pickle=True)
    write_mttl(model, tmp_path / "out.ckpt")
    again, settings = read(tmp_path / "out.ckpt")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert settings["model_modifier"] == adapter


def test_rows_are_written_in_the_order_in_which_mttl_numbers_tasks(tmp_path: Path) -> None:
    model = routed(t5(), ("cedar", "amber", "birch"), num_heads=4)
    write_mttl(model, tmp_path)
    assert json.loads((tmp_path / "tasks.json").read_text()) == ["amber", "birch", "cedar"]
    again = from_mttl(t5(), tmp_path)
    assert again.tasks == ("amber", "birch", "cedar")
    for task in again.tasks:
        assert torch.equal(again.routes[task], model.routes[task])


@pytest.mark.parametrize(("config", "sentence"), [
    ({"method": "private"}, "private adapters"),
    ({"adapter": "ia3", "num_heads": 4}, "routes only LoRAs"),
    ({"granularity": lambda name: name[:9]}, "the same layers share a router"),
    ({"target_modules": r".*block\.0.*\.q|.*block\.1.*\.k"}, "cannot be written for mttl"),
])  # fmt: skip
def test_what_mttl_does_not_have_is_not_written(
    tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        write_mttl(routed(t5(), **config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_routing_halfway_to_the_average_is_not_written(tmp_path: Path) -> None:
    model = routed(t5(), num_heads=4)
    model.mixer.anneal_progress = 0.5
    with pytest.raises(InputError, match="anneal_steps"):
        write_mttl(model, tmp_path)


def test_groups_that_mttl_would_form_in_another_way_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the same layers share a router"):
        write_mttl(routed(llama(), granularity="blockwise"), tmp_path)


# ------------------------------------------------------------------------------- pickles


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_pickle_is_read_only_where_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, *camera_ready(t5()))
    with pytest.raises(InputError, match="--allow-pickle"):
        from_mttl(t5(), path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, zipped: bool, inside: bool) -> None:
    target, path = tmp_path / "made", tmp_path / "x.ckpt"
    hyper, state = camera_ready(t5())
    value: Any = Malicious(target)
    if inside:
        value = {"hyper_parameters": {**hyper, "seed": value}, "state_dict": state}
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"not loaded.*mkdir") as error:
        from_mttl(t5(), path, allow_pickle=True)
    assert not target.exists()
    assert "\n" not in str(error.value)


def test_settings_may_be_a_namespace_with_paths(tmp_path: Path) -> None:
    hyper, state = camera_ready(t5())
    path = saved(tmp_path, argparse.Namespace(**hyper, output_dir=Path("/out")), state)
    assert len(from_mttl(t5(), path, allow_pickle=True).tasks) == T


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_one_sentence(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, *camera_ready(t5()))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"not a whole file of torch\.save"):
        from_mttl(t5(), path, allow_pickle=True)


# ------------------------------------------------------------------------------- wrong input

KEY = "model.encoder.block.0.layer.0.SelfAttention.q"


def changed(**settings: Any) -> Edit:
    return lambda hyper, _: hyper.update(settings)


def without(*parts: str) -> Edit:
    def edit(_: dict[str, Any], state: dict[str, Any]) -> None:
        for part in parts:
            del state[f"{KEY}.{part}"]

    return edit


def put(part: str, value: Any) -> Edit:
    return lambda _, state: state.update({f"{KEY}.{part}": value})


@pytest.mark.parametrize(("edit", "sentence"), [
    (without("lora_a"), "lacks the tensor 'encoder.block.0.layer.0.SelfAttention.q.lora_a'"),
    (without("lora_b"), "lacks the tensor"),
    (without("lora_a", "lora_b"), "lacks the tensor"),
    (lambda _, state: state.update({7: torch.ones(1)}), "holds 7, which is no part"),
    (without("lora_a", "lora_b", "selector.module_logits"), "no adapter for layer"),
    (without("selector.module_logits"), "lacks the routing logits of"),
    (put("lora_a", torch.ones(4, K, 9, R)), "'encoder.*q.lora_a' has shape .* but .* is needed"),
    (put("lora_a", torch.ones(4, K, 8)), "which is of no layout"),
    (put("selector.module_logits", torch.ones(T, 5)), "12 for each task are needed"),
    (put("selector.module_logits", torch.ones(T - 1, 12)), "but .* is needed"),
    (put("lora_b", torch.full((4, K, R, 8), torch.nan)), "not finite fractional numbers"),
    (put("lora_b", torch.ones(4, K, R, 8, dtype=torch.long)), "not finite fractional numbers"),
    (put("lora_c", torch.ones(2)), "no part of a LoRA, Poly, MHR"),
    (put("lora_a", "text"), "no part of a LoRA, Poly, MHR"),
    (lambda _, state: state.clear(), "holds no adapter"),
    (changed(n_skills=7), "n_skills=7 but tensors for 3"),
    (changed(lora_rank=1), "lora_rank=1 but tensors for 2"),
    (changed(lora_alpha="much"), "its setting 'lora_alpha' is a str, not int or float"),
    (changed(n_skills=torch.ones(2)), "its setting 'n_skills' is a Tensor, not int"),
    (changed(module_logits_l2_norm="no"), "'module_logits_l2_norm' is a str, not bool or int"),
    (changed(router_selector=torch.ones(2)), "'router_selector' is a Tensor, not str"),
    (changed(n_tasks="x"), "its setting 'n_tasks' is a str, not int"),
    (put("selector.module_logits", torch.ones(T, 12, dtype=torch.complex64)), "has no values, or"),
    (put("selector.module_logits", torch.ones(T, 12).to_sparse()), "has no values, or"),
    (put("selector.module_logits", torch.ones(0, 12)), "has no values, or"),
    (put("lora_a", torch.ones(4, 0, 8, R)), "has no values, or"),
    (changed(router_selector="moe"), "router_selector='moe', which polyroute does not have"),
    (changed(model_modifier="skilled"), "model_modifier='skilled', which polyroute does not have"),
    (changed(router_granularity="headwise"), "no granularity 'headwise'"),
    (changed(modify_layers="("), "no regular expression"),
    (changed(n_tasks=10**9), "n_tasks is 1,000,000,000, which no model has"),
    (changed(router_granularity="blockwise"), "different routing logits"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, edit: Edit, sentence: str) -> None:
    hyper, state = camera_ready(t5())
    edit(hyper, state)
    base = t5()
    with pytest.raises(InputError, match=sentence) as error:
        from_mttl(base, saved(tmp_path, hyper, state), allow_pickle=True)
    assert "\n" not in str(error.value)
    assert list(base.state_dict()) == list(t5().state_dict())


def test_the_scale_of_the_main_branch_must_be_said(tmp_path: Path) -> None:
    hyper, state = camera_ready(t5())
    as_main(hyper, state)
    del hyper["lora_alpha"]
    with pytest.raises(InputError, match="lacks the setting lora_alpha"):
        from_mttl(t5(), saved(tmp_path, hyper, state), allow_pickle=True)


@pytest.mark.parametrize("other", [llama, stack, lambda: t5(layers=1), lambda: t5(d_model=64)])
def test_another_base_model_is_refused(tmp_path: Path, other: Callable[[], nn.Module]) -> None:
    path = saved(tmp_path, *camera_ready(t5()))
    with pytest.raises(InputError, match=r"another base model|check the base model"):
        from_mttl(other(), path, allow_pickle=True)


def test_the_layout_of_the_other_branch_is_noticed(tmp_path: Path) -> None:
    hyper, state = camera_ready(t5())
    as_main(hyper, state)
    path = saved(tmp_path, hyper, state)
    with pytest.raises(InputError, match="or of the other layout"):
        from_mttl(t5(), path, layout="mttl", allow_pickle=True)


@pytest.mark.parametrize("value", [{"state_dict": {}}, {"hyper_parameters": {}}, [1]])
def test_another_kind_of_pickle_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"so it is no mttl|not a checkpoint"):
        from_mttl(t5(), tmp_path / "x.ckpt", allow_pickle=True)


def test_an_unknown_format_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'peft-poly'"):
        read_inventory(t5(), tmp_path, form="peft_poly")
    with pytest.raises(InputError, match="does not exist"):
        read_inventory(t5(), tmp_path / "none.ckpt", allow_pickle=True)


# ------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a suite, and a checkpoint with a row for each training task."""
    folder = tmp_path_factory.mktemp("mttl")
    write_suite(folder / "suite")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    base = T5ForConditionalGeneration(config)
    base.save_pretrained(folder / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "base")
    saved(folder, *camera_ready(base, modify_layers="q|k|v|o|wi|wo"))
    return folder


def imported(place: Path, out: Path, *extra: str) -> list[str]:
    return [
        "import", str(place / "best.ckpt"), "--model", str(place / "base"), "--out", str(out),
        "--allow-pickle", "--max-input", "16", "--max-target", "8", *extra,
    ]  # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    errors = capsys.readouterr().err
    assert (stop.value.code, "Traceback" in errors) == (2, False)
    return errors.strip()


def test_the_commands_take_an_imported_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, suite = tmp_path / "run", str(place / "suite")
    names = tmp_path / "names.txt"
    names.write_text("\n".join([*TRAIN_TASKS, "other"]) + "\n")
    main(imported(place, run, "--tasks-file", str(names)))
    main(["inspect", str(run)])
    assert "other" in capsys.readouterr().out
    main(["evaluate", str(run), "--data", suite])
    scores = json.loads((run / "evaluate-test.json").read_text())
    assert sorted(score["task"] for score in scores["tasks"]) == sorted(TRAIN_TASKS)
    main(["adapt", str(run), "--data", suite, "--tasks", "pick", "--shots", "4", "--steps", "1",
          "--seeds", "0", "--out", str(tmp_path / "adapted")])  # fmt: skip
    main(["export", str(run), "--task", "other", "--out", str(tmp_path / "lora")])
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    for out, form in (("back", "mttl"), ("back.ckpt", "mttl"), ("poly", "peft-poly")):
        main(["export", str(run), "--format", form, "--out", str(tmp_path / out)])
    assert len(read(tmp_path / "back.ckpt")[0]) == 3 * len(linear(loaded_base(place)))
    again = ["import", str(tmp_path / "poly"), "--model", str(place / "base")]
    main([*again, "--out", str(tmp_path / "again")])
    first, second = (from_pretrained(loaded_base(place), tmp_path / n) for n in ("run", "again"))
    assert first.tasks == second.tasks
    inputs = batch(first.base_model)
    for task in first.tasks:
        ours, theirs = (model(**inputs, tasks=task).logits for model in (first, second))
        assert relative_error(theirs, ours) < 1e-5


def loaded_base(place: Path) -> nn.Module:
    return T5ForConditionalGeneration.from_pretrained(place / "base").eval()


@pytest.mark.parametrize(("extra", "sentence"), [
    (["--format", "lightning"], "no format 'lightning' can be imported"),
    (["--format", "peft-poly"], "is no PEFT checkpoint"),
    (["--tasks-file", "nowhere.txt"], "cannot read nowhere.txt"),
    (["--tasks-file", "names.json"], "names.json must be a JSON list"),
    (["--tasks-file", "few.txt"], "2 task names were given for the 4 routing rows"),
    (["--tasks-file", "none.txt"], "names no task"),
    (["--tasks-file", "twice.txt"], "is given twice"),
    (["--max-input", "0"], "--max-input must be a positive whole number"),
])  # fmt: skip
def test_bad_input_to_import_is_one_sentence_and_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], extra: list[str], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("names.json").write_text('{"a": 1}')
    Path("few.txt").write_text("a\nb\n")
    Path("none.txt").write_text("\n")
    Path("twice.txt").write_text("a\nb\na\nd\n")
    assert sentence in refused(imported(place, tmp_path / "run", *extra), capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_imported_over(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(imported(place, tmp_path / "run"))
    assert "holds a run already" in refused(imported(place, tmp_path / "run"), capsys)
    main(imported(place, tmp_path / "run", "--overwrite"))
    for arguments, sentence in (
        (["--format", "mttl", "--task", "task-0000"], "leave --task out"),
        ([], "name it with --task"),
        (["--format", "onnx", "--task", "mu"], "no format 'onnx' can be written"),
        (["--format", "mttl", "--out", str(place)], "holds no checkpoint of mttl"),
        (["--format", "mttl", "--out", str(place / "best.ckpt")], "is there already"),
    ):
        command = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *arguments]
        assert sentence in refused(command, capsys)
