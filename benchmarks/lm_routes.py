"""Routes that need no training, for `lm_studies.py`: by a task's texts, or by its examples."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from fewshot_classifier import embedded, encoder
from paper_study import Routes, Study, mixed, usage
from sentence_transformers import SentenceTransformer
from torch import Tensor

import polyroute as pr
from polyroute.adapting.starts import nearest_routes
from polyroute.data.sampling import draw_few_shot
from polyroute.data.suite import Suite
from polyroute.kinds.choose import ModelKind
from polyroute.study.examples import encoded

__all__ = ["by_examples", "by_text", "by_usage"]

PROMPTS = 32
"""Of a task, whose mean embedding stands for it."""
LONGEST = 128
"""Tokens of a prompt that are embedded."""
TOKENS = 2048
"""In a forward of the language model."""


def by_text(temperature: float) -> Routes:
    """Mix the routes of the training tasks by how near their prompts lie; no answer is seen.

    A training task with cosine c has the weight `softmax(c / temperature)`.
    """

    def routes(
        study: Study, model: pr.RoutedModel, kind: ModelKind, tasks: Sequence[str]
    ) -> dict[str, Tensor]:
        known = torch.stack([_embedded(study.suite, task) for task in model.tasks])
        found = {}
        for task in tasks:
            cosines_T = known @ _embedded(study.suite, task)
            found[task] = mixed(model, torch.softmax(cosines_T / temperature, 0))
        return found

    return routes


def by_usage(
    study: Study, model: pr.RoutedModel, kind: ModelKind, tasks: Sequence[str]
) -> dict[str, Tensor]:
    """Give every new task the mean of the mixtures of the training tasks."""
    return dict.fromkeys(tasks, usage(model))


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
def _encoder() -> SentenceTransformer:
    model = encoder()
    model.max_seq_length = LONGEST
    return model


@cache
def _embedded(suite: Suite, task: str) -> Tensor:
    """The mean embedding of a task's first prompts, `[D]`, of length 1."""
    rows = suite.split(task, "train")
    texts = [
        "\n".join([row["instruction"] or "", row["input"] or "", ", ".join(row["choices"] or ())])
        for row in rows.select(range(min(PROMPTS, len(rows))))
    ]
    mean_D = torch.from_numpy(embedded(_encoder(), texts)).float().mean(0)
    return torch.nn.functional.normalize(mean_D, dim=0)
