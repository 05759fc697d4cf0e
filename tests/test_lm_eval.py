"""lm-evaluation-harness scores a routed model as the library and plain loops do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from base_models import llama, t5
from models import routed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import lm_evaluation  # noqa: E402

from polyroute.data.open import open_suite  # noqa: E402
from polyroute.kinds.choose import kind_of  # noqa: E402
from polyroute.study.evaluate import evaluate  # noqa: E402
from polyroute.study.examples import encoded  # noqa: E402

ITEMS = [json.loads(line) for line in lm_evaluation.TASK.with_suffix(".jsonl").open()]


def byte_llama() -> tuple[Any, Any]:
    """ByT5's tokenizer ends every text, also a prompt; those of causal models do not."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    return llama()[0], fast


def made(make: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    base, tokenizer = make()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return routed(base.eval(), ("amber", "capitals"), num_heads=4), tokenizer


def scores_of(report: dict[str, Any]) -> list[list[float]]:
    """By item and choice."""
    samples = report["samples"]["capitals"]
    return [[score for score, _ in sample["filtered_resps"]] for sample in samples]


def by_hand(model: Any, tokenizer: Any, item: dict[str, Any], route: str) -> list[float]:
    """The summed log-probability of each choice, one forward for each.

    The harness counts white space at the end of a prompt to every choice.
    """
    prompt = tokenizer(item["input"])["input_ids"]
    scores = []
    for choice in item["choices"]:
        ids = tokenizer("\n" + choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]), tasks=route).logits[0].double()
        steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        scores.append(float(steps[range(len(ids)), ids].sum()))
    return scores


@pytest.mark.parametrize("route", ["amber", "mu"])
def test_a_causal_model_scores_every_choice_as_by_hand(route: str) -> None:
    model, tokenizer = made(byte_llama)
    report = lm_evaluation.evaluate(model, tokenizer, route)
    expected = [by_hand(model, tokenizer, item, route) for item in ITEMS]
    np.testing.assert_allclose(scores_of(report), expected, rtol=1e-5)
    right = [
        item["choices"][np.argmax(scores)] == item["target"]
        for item, scores in zip(ITEMS, expected, strict=True)
    ]
    assert report["results"]["capitals"]["acc,none"] == pytest.approx(np.mean(right))
    assert by_hand(model, tokenizer, ITEMS[0], "capitals") != pytest.approx(expected[0], rel=1e-2)


@pytest.mark.parametrize(("make", "between"), [(byte_llama, "\n"), (t5, "")])
def test_scores_and_accuracy_are_those_of_the_library(
    make: Any, between: str, tmp_path: Path
) -> None:
    model, tokenizer = made(make)
    lines = [json.dumps({"instruction": "", "split": "test", **item}) for item in ITEMS]
    (tmp_path / "capitals.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # The library asks for the end token of a choice too.
    config = yaml.safe_load(lm_evaluation.TASK.read_text(encoding="utf-8"))
    config["doc_to_text"] = "{{input}}" + between
    config["doc_to_choice"] = "{{choices|map('regex_replace', '$', '</s>')|list}}"
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    report = lm_evaluation.evaluate(model, tokenizer, "capitals", tmp_path / "capitals.yaml")
    kind, suite = kind_of(model, tokenizer), open_suite(tmp_path)
    rows = encoded(suite, "capitals", "test", kind).to_list()
    ours = np.array([scores[:, 0].tolist() for scores in kind.scores(model, rows)])
    theirs = np.array(scores_of(report))
    # Up to the newline, which is the same for all choices.
    np.testing.assert_allclose(theirs - theirs[:, :1], ours - ours[:, :1], atol=1e-3, rtol=1e-5)
    score = evaluate(model, kind, suite, ["capitals"], route="capitals")[0].score
    assert report["results"]["capitals"]["acc,none"] == pytest.approx(score)


def test_the_example_runs_as_a_script(tmp_path: Path) -> None:
    base, tokenizer = byte_llama()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    routed(base, ("amber",)).save_pretrained(tmp_path / "inventory")
    script = [sys.executable, str(ROOT / "examples" / "lm_evaluation.py")]
    options = ["--model", str(tmp_path / "base"), "--inventory", str(tmp_path / "inventory")]
    done = subprocess.run(
        [*script, *options, "--route", "amber"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "capitals" in done.stdout
    assert "acc_norm" in done.stdout
