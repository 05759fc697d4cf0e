"""Cards say how the base model is prompted, and their code gives the prompts of training."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_peft_export import llama
from tiny_runs import train_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

import polyroute as pr
from polyroute.host.files import read_json, write_json
from polyroute.program.cli.app import main
from polyroute.program.commands.runs import base_of
from polyroute.saved.card import write_card
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.prompting import Prompting, prompting_of

SYSTEM = 'Answer in "one" word.\nNo more.'


def code_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


def chat_run(place: Path, chat_base: Path, run: str, *extra: str) -> Path:
    arguments = train_arguments(place, run, "--max-input", "96", "--steps", "1", *extra)
    arguments[arguments.index("--model") + 1] = str(chat_base)
    main(arguments)
    return place / run


@pytest.mark.parametrize(
    ("extra", "prompting"),
    [
        (["--system", SYSTEM], Prompting("chat", SYSTEM)),
        ([], Prompting("chat")),
        (["--prompt", "plain"], Prompting("plain", newline=True)),
    ],
    ids=["system", "chat", "plain"],
)
def test_the_code_of_every_card_prompts_as_in_training(
    place: Path, chat_base: Path, tmp_path: Path, extra: list[str], prompting: Prompting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = chat_run(place, chat_base, tmp_path.name, *extra)
    assert prompting_of(read_json(run / "run.json")) == prompting
    main(["export", str(run), "--task", "copy", "--out", str(tmp_path / "lora")])
    main([
        "adapt", str(run), "--data", str(place / "suite"), "--tasks", "first", "--shots", "4",
        "--steps", "1", "--seeds", "0", "--out", str(tmp_path / "adapted"),
    ])  # fmt: skip
    adapted = tmp_path / "adapted" / "first" / "seed-0"
    cards = [(tmp_path / "lora" / "README.md"), (adapted / "README.md")]
    texts = [card.read_text() for card in cards]
    for text in (*texts, write_card(run)):
        assert prompting.sentence() in " ".join(text.split(" "))
    if prompting.system is not None:
        assert json.dumps(SYSTEM) in texts[0]

    _, kind = base_of(run)
    row = {"task": ["copy"], "instruction": ["Do."], "input": ["it"], "target": ["x"],
           "choices": [None]}  # fmt: skip
    expected = kind.encode(row)["prompt_ids"][0]
    base = AutoModelForCausalLM.from_pretrained(chat_base)
    names: dict[str, Any] = {"base": base, "tokenizer": AutoTokenizer.from_pretrained(chat_base)}
    code = code_of(texts[0]).replace("FOLDER", str(tmp_path / "lora")).replace("...", "Do.\\nit")
    exec(code, names)
    assert names["prompt"]["input_ids"][0].tolist() == expected
    assert isinstance(names["model"], peft.PeftModel)
    assert names["ids"].shape[0] == 1


def test_a_result_in_python_has_the_card_too(tmp_path: Path, chat_base: Path) -> None:
    torch.manual_seed(0)
    base, tokenizer = (auto.from_pretrained(chat_base) for auto in (
        AutoModelForCausalLM, AutoTokenizer))  # fmt: skip
    model = pr.attach(base, pr.MHRConfig(num_skills=2, num_heads=2, rank=1), ["a"])
    kind = pr.kind_of(base, tokenizer)
    examples = {"b": [{"input": "yes?", "target": "yes"}]}
    result = pr.adapt_many(model, examples, kind=kind, steps=1)[0]
    result.export_peft(tmp_path)
    assert "prompted by its chat template" in (tmp_path / "README.md").read_text()


def test_a_card_of_ones_own_stays(tmp_path: Path) -> None:
    model = pr.attach(llama(), pr.MHRConfig(num_skills=2, num_heads=2, rank=1), ["a"])
    model.export_peft("a", tmp_path)
    assert not (tmp_path / "README.md").exists()  # the model alone does not know its prompts
    write_peft_card(tmp_path, Prompting("plain"))
    write_peft_card(tmp_path, Prompting("chat", "Be short"))
    assert 'the system message `"Be short"`' in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write_peft_card(tmp_path, Prompting("plain"))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_older_runs_did_is_known(run: Path, tmp_path: Path) -> None:
    description = read_json(run / "run.json")
    assert prompting_of(description) == Prompting("plain")  # T5
    del description["prompting"]
    assert prompting_of(description) == Prompting("auto")
    del description["config"]["prompt"]
    assert prompting_of(description) == Prompting("plain")
    assert prompting_of({}) is None
    for way in ("plain", "auto", "chat"):
        assert "prompted by" in Prompting(way).sentence()
    write_json(tmp_path / "run.json", {"prompting": {"by": "mail"}})
    with pytest.raises(pr.InputError, match=r"run\.json is damaged: prompting is"):
        prompting_of(read_json(tmp_path / "run.json"))


def test_a_card_loads_a_base_model_that_polyroute_alone_finds_by_name(tmp_path: Path) -> None:
    model = pr.attach(llama(), pr.MHRConfig(num_skills=2, num_heads=2, rank=1), ["a"])
    model.export_peft("a", tmp_path)
    run = {"model": "smollm2", "dtype": "bfloat16"}
    write_peft_card(tmp_path, Prompting("chat"), run)
    card = (tmp_path / "README.md").read_text()
    assert 'import polyroute as pr\n\nbase, tokenizer = pr.load_base("smollm2", dtype="bf' in card
