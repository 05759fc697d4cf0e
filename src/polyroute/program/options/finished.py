"""Options of the commands that score, exchange, publish or show a trained inventory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.library.names import TOKEN_ROUTES
from polyroute.program.options.flags import flags_of, group
from polyroute.program.options.shared import (
    CONFIG,
    LIMITS,
    READER,
    REQUIRED,
    RUN_HELP,
    Options,
    Reading,
    Source,
)
from polyroute.settings import flag, named, setting, text, whole

__all__ = [
    "CheckOptions",
    "EvaluateOptions",
    "ExportOptions",
    "ImportOptions",
    "InspectOptions",
    "PushOptions",
    "ReportOptions",
]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Options of `polyroute evaluate`."""

    run: Path | None = setting(
        None, argument=True, help=f"{RUN_HELP} Leave it out to score a base model alone."
    )
    model: str | None = setting(
        None, text(optional=True), from_run=True, help="Base model to score alone, as in train."
    )
    reading: Reading = group(Reading, from_run=True, panel="A base model alone")
    source: Source = group(Source)
    zero_shot: bool = setting(False, flag(), help="Route every task as the average of the skills.")
    route: str | None = setting(
        None, values=TOKEN_ROUTES,
        help="How each token chooses among the skills: arrow, spectr or lag; see docs/library.md.",
    )  # fmt: skip
    top_k: int | None = setting(
        None, whole(optional=True), help="With --route: skills that a token uses [the route's]."
    )
    split: str = setting("test", text(), help="train, validation or test.")
    batch_size: int = setting(32, whole(), help="Examples in a forward.")
    max_test: int | None = setting(
        None, whole(optional=True), help="Most examples of each task, drawn with one seed [all]."
    )
    out: Path | None = setting(None, help="JSON file [RUN/evaluate-SPLIT.json].")
    config: Path | None = setting(None, **CONFIG)

    def __post_init__(self) -> None:
        """Check every value, and that either a run or a base model is scored."""
        super().__post_init__()
        if self.run is None and self.model is None:
            raise InputError("name a run, or with --model a base model to score alone")
        if self.run is None and self.zero_shot:
            raise InputError("--zero-shot is for a run: leave it out with --model")
        if self.route is not None:
            named(TOKEN_ROUTES)("--route", self.route)
            if self.run is None or self.zero_shot:
                raise InputError("--route chooses among the skills of a run, without --zero-shot")
        elif self.top_k is not None:
            raise InputError("--top-k goes with --route: name arrow, spectr or lag")
        if self.run is None and self.out is None:
            raise InputError("say with --out where the scores of a base model alone go")
        for each in flags_of(type(self)):
            place = self.given.places.get(each.name)
            is_fixed = each.marks.get("from_run") and each.name not in LIMITS
            if self.run is not None and is_fixed and place is not None:
                raise InputError(f"{place} comes from the run; leave it out, or leave out the run")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Options of `polyroute export`."""

    run: Path = setting(REQUIRED, argument=True, help=RUN_HELP)
    out: Path = setting(
        REQUIRED, recorded=False, help="Folder to write to; for mttl also a name.ckpt."
    )
    task: str | None = setting(
        None, help="Task name, or `mu` for the average of the skills; for peft alone."
    )
    all_tasks: bool = setting(
        False, flag(), option="all",
        help="Write every task, and `mu`, to a folder of its own in --out; for peft alone.",
    )  # fmt: skip
    format: str = setting(
        "peft", values=("peft", "mttl", "peft-mhr", "peft-poly"),
        help="peft: tasks as LoRAs. mttl, peft-mhr or peft-poly: skills and all routes.",
    )  # fmt: skip
    resume: bool = setting(
        False, flag(), recorded=False, help="With --all: continue the export in --out."
    )
    overwrite: bool = setting(
        False, flag(), recorded=False, help="With --all: replace the export in --out."
    )

    def __post_init__(self) -> None:
        """Check every value, and that what is asked for goes together."""
        super().__post_init__()
        if self.all_tasks and self.task is not None:
            raise InputError("--all and --task exclude each other")
        if self.all_tasks and self.format != "peft":
            raise InputError(
                f"--all is for --format peft: leave it out, since {self.format} has all tasks"
            )
        for name in ("resume", "overwrite"):
            if getattr(self, name) and not self.all_tasks:
                raise InputError(f"--{name} goes with --all")


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Options of `polyroute push`."""

    run: Path = setting(REQUIRED, argument=True, help="Folder that `polyroute train` wrote.")
    repository: str = setting(
        REQUIRED, argument=True, help="On the hub, user/inventory; made if it is missing."
    )
    private: bool = setting(False, flag(), help="Make a new one private.")
    revision: str | None = setting(None, help="Branch, made if it is missing [main].")
    message: str | None = setting(None, help="Message of the commit.")
    license: str | None = setting(
        None, help="Licence of the inventory, as the hub names it: apache-2.0."
    )


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options):
    """Options of `polyroute import`."""

    source: Path = setting(
        REQUIRED, argument=True, help="Checkpoint of mttl (.ckpt), or folder of PEFT."
    )
    model: str = setting(REQUIRED, help="The base model that it was trained on, as in train.")
    out: Path = setting(REQUIRED, recorded=False, help="Folder of the run.")
    format: str | None = setting(
        None, values=("mttl", "mttl-main", "peft", "peft-mhr", "peft-poly", "library"),
        help="mttl, mttl-main, peft (a LoRA), peft-mhr, peft-poly, or library: all LoRAs in the "
        "sub-folders of SOURCE, each a task [by what is there].",
    )  # fmt: skip
    tasks_file: Path | None = setting(
        None, help="Names of the routing rows: one a line, or a JSON list [numbers]."
    )
    allow_pickle: bool = setting(
        False, flag(), help="Read .ckpt, .pt and .bin; runs no code in them."
    )
    reading: Reading = group(Reading)
    overwrite: bool = setting(False, flag(), recorded=False, help="Replace the run in --out.")
    config: Path | None = setting(None, **CONFIG)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """Options of `polyroute check`."""

    run: Path = setting(REQUIRED, argument=True, help="Folder of a run, an inventory or adapters.")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """Options of `polyroute inspect`."""

    run: Path = setting(REQUIRED, argument=True, help=RUN_HELP)
    data: str | None = setting(
        None, help="Suite: compares routes with the categories of its tasks."
    )
    reader: Mapping[str, Any] | None = setting(None, **READER)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Options of `polyroute report`."""

    runs: Sequence[Path] = setting(
        REQUIRED, argument=True, typed=list[Path],
        help="Folders that train, adapt, reproduce or a demo wrote.",
    )  # fmt: skip
    out: Path = setting(Path("report.html"), help="The page; an older report is replaced.")
    data: str | None = setting(None, help="Suite with the categories of tasks [that of the runs].")
    reader: Mapping[str, Any] | None = setting(None, **READER)
