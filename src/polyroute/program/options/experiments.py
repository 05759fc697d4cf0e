"""Options of the commands that run whole experiments: `demo`, `demo-lm` and `reproduce`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polyroute.program import texts
from polyroute.program.options.shared import REQUIRED, RunOptions
from polyroute.program.recipes import shipped
from polyroute.settings import flag, setting

__all__ = ["DemoLmOptions", "DemoOptions", "ReproduceOptions"]


@dataclass(frozen=True, kw_only=True)
class DemoOptions(RunOptions):
    """Options of `polyroute demo`."""

    out: Path = setting(Path("demo-out"), help="Folder for results, plots and adapters.")
    quick: bool = setting(False, flag(), help="A tenth of the work, to see that it runs.")


@dataclass(frozen=True, kw_only=True)
class DemoLmOptions(RunOptions):
    """Options of `polyroute demo-lm`."""

    out: Path = setting(
        Path("demo-lm-out"), recorded=False, help="Folder for runs, results, LoRAs and the page."
    )
    quick: bool = setting(False, flag(), help="A tenth of the work, to see that it runs.")


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(RunOptions):
    """Options of `polyroute reproduce`."""

    preset: str = setting(
        REQUIRED, argument=True, values=partial(shipped, "presets"), help="suite, superni or t0."
    )
    out: Path = setting(REQUIRED, help="Folder of the results; each method has one in it.")
    model: str | None = setting(None, help="Base model [the paper's].")
    data: str | None = setting(None, help="Suite, in the format of the preset.")
    methods: Sequence[str] | None = setting(
        None, parse=texts.names, typed=str,
        help="Methods of the preset, separated by commas [all].",
    )  # fmt: skip
    selection: str = setting(
        "separate",
        help="How the best step is chosen: separate, or paper as published, some on test data.",
    )
    settings: Mapping[str, Any] | None = setting(
        None, parse=texts.replacements, typed=list[str], option="set",
        help="Replace a value: train.steps=3, seeds=[0]. Repeat for more.",
    )  # fmt: skip
    quick: bool = setting(
        False, flag(), help="A tenth of the work and one seed, to see that it runs."
    )
    dry_run: bool = setting(
        False, flag(), panel="Run", help="Check everything, print the plan, and write nothing."
    )
