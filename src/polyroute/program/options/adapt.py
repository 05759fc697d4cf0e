"""Options of `polyroute adapt`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyroute.adapting.settings import AdaptSettings
from polyroute.program import texts
from polyroute.program.options.flags import group
from polyroute.program.options.shared import (
    OBJECTIVE,
    REQUIRED,
    RUN_HELP,
    Limits,
    PlannedOptions,
    Source,
)
from polyroute.settings import flag, setting, text, whole

__all__ = ["AdaptOptions"]


@dataclass(frozen=True, kw_only=True)
class AdaptOptions(PlannedOptions):
    """Options of `polyroute adapt`."""

    run: Path = setting(REQUIRED, argument=True, help=RUN_HELP)
    source: Source = group(Source)
    settings: AdaptSettings = group(AdaptSettings, defaults={"shots": 32}, panel="Adaptation")
    objective: str = setting("lm", **OBJECTIVE, panel="Adaptation")
    seeds: Sequence[int] = setting(
        (42, 1024, 0), parse=texts.seeds, typed=str, help="One draw and one training each."
    )
    grid: Mapping[str, Sequence[Any]] | None = setting(
        None, parse=texts.grid, typed=list[str],
        help="Try several values: route_lr=0.03,0.1. Repeat for more settings.",
    )  # fmt: skip
    memory: str | None = setting(
        None, recorded=False,
        help="Memory for adaptations side by side, such as 8GB [half of what is free].",
    )  # fmt: skip
    deterministic: bool = setting(
        False, flag(),
        help="Adapt one after the other: each the same to the bit, whatever else is adapted to.",
    )  # fmt: skip
    limits: Limits = group(Limits, panel="Adaptation")
    split: str = setting("test", text(), help="Split to score on.")
    max_test: int | None = setting(
        None, whole(optional=True),
        help="Most examples of each task to score on, drawn with one seed [all].",
    )  # fmt: skip
    out: Path | None = setting(
        None, recorded=False, help="Folder of results [RUN/adapt-PHASE-SHOTS]."
    )

    @property
    def tasks(self) -> Sequence[str] | None:
        """The tasks by name; None for all that the suite holds out."""
        return None if self.source.tasks == ["all"] else self.source.tasks
