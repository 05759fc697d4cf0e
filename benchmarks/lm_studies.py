"""The study of `paper.py` on a language model, SmolLM2: how skills come to differ, and who wins.

It has the tasks of the study with the sentence encoder. Skills that start alike and routes that
start uniform get the same gradient, so `APART` compares ways of starting them apart by what
training itself shows: its loss, the entropy of the mixtures and the cosine between skills. Only
then are the development tasks looked at, and the held-out tasks only once settings are chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_starts import alike, grouped
from paper_studies import real
from paper_study import Prepare, Study, Training

from polyroute.host.dtypes import AUTO, settled_dtype

RANK = 4
MHR: Mapping[str, Any] = {"method": "mhr", "num_skills": 8, "num_heads": 8, "rank": RANK}


def language_model(work: Path, results: Path, data: str) -> Study:
    """SmolLM2-135M-Instruct on the 46, 15 and 35 tasks with choices."""
    return replace(
        real(work, results, data),
        name="lm",
        base="smollm2",
        dtype=settled_dtype(AUTO),
        max_input=256,
        exclude=None,
        inventories={
            "shared": {"method": "shared", "rank": RANK},
            "shared-matched": {"method": "shared", "rank": 8 * RANK},
            "mhr": MHR,
            "spread": {**MHR, "route_spread": 3.0},
        },
        results=results / "lm",
        max_examples=60,
    )


@dataclass(frozen=True)
class Start:
    """One way of starting an inventory."""

    config: str
    prepare: Prepare | None = None


APART: Mapping[str, Start] = {
    "shared": Start("shared"),
    "twins": Start("mhr"),
    "spread": Start("spread"),
    "spread-alike": Start("spread", alike),
    "grouped": Start("mhr", grouped),
}
APART_TRAINING = Training(steps=300, batch_size=8, lr=2e-3, route_lr=0.1)
APART_ADAPTATION: Mapping[str, Any] = {"shots": 32, "batch_size": 8, "steps": 16}
APART_CELLS: Mapping[str, Mapping[str, Any]] = {
    "mu": {"phase": "mu", "lr": 3e-3},
    "mu-nearest": {"phase": "mu", "lr": 3e-3, "init": "nearest"},
}
"""How each start is adapted to the development tasks; `nearest` only where there are routes."""
