"""The example of a few-shot classifier, its benchmark, and the page of the benchmark's results."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_models import WORDS, bert
from models import routed
from torch import nn

pytest.importorskip("sentence_transformers", minversion="6.0")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import fewshot_classifier as benchmark  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling  # noqa: E402

from examples import fewshot_classifier as example  # noqa: E402
from polyroute.data.open import open_suite  # noqa: E402

INSTRUCTION = "is it"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny sentence encoder, and an inventory on it in the folder beside it."""
    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model, tokenizer = bert()
    tokenizer.pad_token = "[UNK]"
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    parts = [Transformer(str(place)), Pooling(16, "mean"), Normalize()]
    SentenceTransformer(modules=parts).save_pretrained(str(place / "base"))
    trained = routed(model, num_heads=4, exclude_modules="pooler.dense")
    trained.save_pretrained(place / "inventory")
    return str(place / "base")


def texts(seed: int, number: int = 8) -> tuple[list[str], list[str]]:
    """A third of the words are those of a class."""
    draw = np.random.default_rng(seed)
    found, labels = [], []
    for label, own in {"cat": ["cat", "sat", "mat"], "dog": ["dog", "ran", "big"]}.items():
        for _ in range(number):
            found.append(" ".join([*draw.choice(WORDS, 3), *draw.choice(own, 2)]))
            labels.append(label)
    return found, labels


@pytest.mark.parametrize(("phase", "has_inventory"), [("mu", True), ("z", True), ("mu", False)])
def test_the_example_learns_saves_and_loads(
    base: str, tmp_path: Path, phase: str, has_inventory: bool
) -> None:
    inventory = str(Path(base).parent / "inventory") if has_inventory else None
    seen, labels = texts(0)
    options = {"base": base, "inventory": inventory, "instruction": INSTRUCTION, "phase": phase}
    classifier = example.FewShotClassifier.fit(seen, labels, steps=40, lr=1e-2, **options)
    assert classifier.predict(seen) == labels
    new, _ = texts(1, 20)
    predicted = classifier.predict(new)
    classifier.save(tmp_path / "out")
    again = example.FewShotClassifier.load(tmp_path / "out")
    assert again.predict(new) == predicted
    again_embeddings = again.encoder.encode(new, task=example.TASK)
    expected = classifier.encoder.encode(new, task=example.TASK)
    np.testing.assert_array_equal(again_embeddings, expected)


def test_adapting_draws_the_examples_near_the_names_of_their_classes(base: str) -> None:
    seen, labels = texts(0)
    names = sorted(set(labels))

    def right(steps: int) -> float:
        classifier = example.FewShotClassifier.fit(seen, labels, base=base, steps=steps, lr=1e-2)
        embeddings, own = (classifier.encoder.encode(t, task=example.TASK) for t in (seen, names))
        best = (embeddings @ own.T).argmax(1)
        return float(np.mean([names[i] == label for i, label in zip(best, labels, strict=True)]))

    assert right(40) > right(1)


def test_the_example_runs_as_a_script(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--base", base, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fewshot_classifier.py", *arguments])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines] == example.QUESTIONS
    assert {line.partition(": ")[0] for line in lines} <= set(example.EXAMPLES)


def write_suite(folder: Path) -> None:
    role = {"category": "intent", "choices": True, "metric": "accuracy", "role": "held-out"}
    (folder / "roles.json").write_text(json.dumps({"animals": role, "rare": role}))
    for name, number in (("animals", 12), ("rare", 3)):  # too few of each class to draw from
        lines = []
        for seed, split in enumerate(("train", "test")):
            for text, label in zip(*texts(seed, number), strict=True):
                record = {"instruction": INSTRUCTION, "input": text, "target": label}
                lines.append(json.dumps({**record, "choices": ["cat", "dog"], "split": split}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def test_the_benchmark_measures_every_contender_once(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_suite(tmp_path)
    suite = open_suite(tmp_path)
    assert benchmark.test_tasks(suite) == ["animals"]
    task = benchmark.draw(suite, "animals", 0)
    assert [task.answers.count(label) for label in task.labels] == [8, 8]
    assert set(task.texts).isdisjoint(task.test_texts)
    monkeypatch.setattr(benchmark, "BASE", base)
    monkeypatch.setattr(benchmark, "LONGEST", 24)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(benchmark, "SETFIT", {**benchmark.SETFIT, "steps": 3})
    cells = benchmark.to_run({"mhr": str(Path(base).parent / "inventory")})
    for _ in range(2):  # the second time there is nothing left to do
        benchmark.measure("test", suite, ["animals"], [0], cells)
    results = json.loads((tmp_path / "results.json").read_text())
    contenders = [row["contender"] for row in results["test"]]
    assert len(contenders) == len(set(contenders))
    assert set(contenders) >= set(benchmark.NAMES)
    assert all(0 <= row["accuracy"] <= 1 for row in results["test"])


def row(contender: str, task: str, accuracy: float) -> dict[str, Any]:
    where = {"task": task, "seed": 0, "cell": "", "contender": contender}
    return {**where, "accuracy": accuracy, "fit": 2.0, "answer": 1.0}


def test_the_table_pairs_tasks() -> None:
    ours = [row("mhr, mu, examples", "a", 0.9), row("mhr, mu, examples", "b", 0.5)]
    frozen = [row("frozen", "a", 0.7), row("frozen", "b", 0.1)]
    tuned = [row("setfit", "a", 0.8), row("setfit", "b", 0.4)]
    table = benchmark.contenders_table({"test": [*ours, *frozen, *tuned]})
    line = next(line for line in table.splitlines() if "phase mu, then" in line)
    assert "0.700 [0.500, 0.900] | +0.300 [+0.200, +0.400] | +0.100 [+0.100, +0.100]" in line


def test_the_page_is_that_of_the_results() -> None:
    text = benchmark.PAGE.read_text(encoding="utf-8")
    assert text == benchmark.page(), "run `python benchmarks/fewshot_classifier.py page`"
