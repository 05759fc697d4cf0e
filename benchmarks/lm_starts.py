"""Ways to start the skills of an inventory apart, for `lm_studies.py`."""

from paper_study import Study

import polyroute as pr
from polyroute.kinds.choose import ModelKind
from polyroute.study.examples import encoded_mixture
from polyroute.study.groups import share_one_a, start_in_groups

__all__ = ["EXAMPLES", "alike", "grouped"]

EXAMPLES = 8
"""Examples of a task whose gradient is taken. (`apart-grouped` took 16.)"""


def alike(study: Study, model: pr.RoutedModel, kind: ModelKind, seed: int) -> None:
    """Give all skills the same A, so that every mixture of them has its size."""
    share_one_a(model)


def grouped(study: Study, model: pr.RoutedModel, kind: ModelKind, seed: int) -> None:
    """Give each skill a group of tasks whose gradients agree at the base, and all skills one A.

    With as many skills as the 46 tasks, beside one that is on for all, each task has its own; a
    mixture is then 48 % the common skill, 46 % the task's own, and 5 % the others.
    """
    rows = encoded_mixture(study.suite, study.train, "train", kind)
    start_in_groups(model, kind, rows, examples=EXAMPLES, seed=seed)
