"""Options of the commands for LoRAs that exist: `library`, `merge`, `recompress`, `rank`, ...."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.library.names import METHODS, TOKEN_ROUTES
from polyroute.library.settings import JudgeSettings
from polyroute.program import texts
from polyroute.program.options.flags import group
from polyroute.program.options.shared import REQUIRED, RUN_HELP, Options, Source
from polyroute.settings import check_settings, flag, number, one_of, setting, text, whole

__all__ = [
    "CompareOptions",
    "FreezeOptions",
    "LibraryOptions",
    "MergeOptions",
    "RankOptions",
    "RecompressOptions",
    "Size",
]

LORAS = (
    "LoRAs of PEFT: folders, folders of such folders, or ids on the hub. NAME=LORA gives one "
    "another name than that of its folder."
)
LIBRARY_HELP = "Folder that `polyroute import --format library` wrote."
PICKLE_HELP = "Read adapter_model.bin where there are no safetensors; runs no code in it."


@dataclass(frozen=True, kw_only=True)
class Gathered(Options):
    """What every command for several LoRAs has."""

    loras: Sequence[str] = setting(REQUIRED, argument=True, typed=list[str], help=LORAS)
    allow_pickle: bool = setting(False, flag(), help=PICKLE_HELP)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a LoRA that is computed."""

    rank: int | None = setting(None, whole(optional=True), help="Most ranks of a layer.")
    energy: float | None = setting(
        None, number(above=0, most=1, optional=True),
        help="Share of each layer's squared norm that stays, up to 1.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every value."""
        check_settings(self)
        if self.rank is not None and self.energy is not None:
            raise InputError("--rank and --energy exclude each other; leave one out")


@dataclass(frozen=True, kw_only=True)
class LibraryOptions(Gathered):
    """Options of `polyroute library`."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Gathered):
    """Options of `polyroute merge`."""

    out: Path = setting(REQUIRED, help="Folder to write the LoRA to.")
    method: str = setting(
        "mean", one_of(*METHODS),
        help="mean, arithmetic (weighted sum), ties, dare, knots or wudi; see docs/library.md.",
    )  # fmt: skip
    weight: Mapping[str, float] | float = setting(
        1.0, parse=texts.weights, typed=list[str],
        help="NAME=NUMBER, repeated, for the LoRAs that take part; or one number for all [1].",
    )  # fmt: skip
    size: Size = group(Size)
    keep: float | None = setting(
        None,
        number(above=0, most=1, optional=True),
        help="ties, knots: share of entries that stay [0.2].",
    )
    drop: float | None = setting(
        None, number(least=0, below=1, optional=True),
        help="dare [0.9], ties, knots [0]: share of entries that are dropped at random.",
    )  # fmt: skip
    seed: int | None = setting(None, whole(0, optional=True), help="Draws what is dropped [0].")
    ridge: float | None = setting(
        None, number(least=0, optional=True), help="wudi: pull towards the sum [0.1]."
    )

    def __post_init__(self) -> None:
        """Check every value, and that the method has the options that were given."""
        super().__post_init__()
        for name in self.options_of_method():
            if name not in METHODS[self.method]:
                able = ", ".join(m for m, own in METHODS.items() if name in own)
                raise InputError(f"--{name} is for {able}: leave it out with {self.method}")

    def options_of_method(self) -> dict[str, Any]:
        """Those that were given."""
        every = {"keep": self.keep, "drop": self.drop, "seed": self.seed, "ridge": self.ridge}
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RecompressOptions(Options):
    """Options of `polyroute recompress`."""

    lora: str = setting(
        REQUIRED, argument=True, help="LoRA of PEFT: a folder, or an id on the hub."
    )
    out: Path = setting(REQUIRED, help="Folder to write the LoRA to.")
    size: Size = group(Size)
    allow_pickle: bool = setting(False, flag(), help=PICKLE_HELP)

    def __post_init__(self) -> None:
        """Check every value, and that a size is given."""
        super().__post_init__()
        if self.size.rank is None and self.size.energy is None:
            raise InputError("say with --rank or --energy how much stays")


@dataclass(frozen=True, kw_only=True)
class RankOptions(Options):
    """Options of `polyroute rank`."""

    run: Path = setting(REQUIRED, argument=True, help=LIBRARY_HELP)
    source: Source = group(Source)
    shots: int = setting(32, whole(), help="Examples of each task to rank by.")
    seed: int = setting(0, whole(0), help="Draws the examples.")
    diversity: float = setting(
        0.0, number(least=0, most=1),
        help="0 to 1: how much a LoRA loses for being like those before it.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FreezeOptions(Options):
    """Options of `polyroute freeze`."""

    run: Path = setting(REQUIRED, argument=True, help=RUN_HELP)
    source: Source = group(Source)
    out: Path = setting(REQUIRED, help="Folder to write the LoRA to.")
    route: str = setting(
        "arrow", one_of(*TOKEN_ROUTES), help="The route to freeze: arrow, spectr or lag."
    )
    top_k: int | None = setting(
        None, whole(optional=True), help="Skills that a token uses [the route's]."
    )
    rank: int = setting(16, whole(), help="Most ranks of a layer.")
    texts: int = setting(200, whole(), help="Prompts of the tasks to learn from, without answers.")
    tokens: int = setting(8, whole(), help="Tokens that the route itself writes after a prompt.")
    batch_size: int = setting(8, whole(), help="Prompts in a forward.")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Options of `polyroute compare`."""

    run: Path = setting(REQUIRED, argument=True, help=LIBRARY_HELP)
    source: Source = group(Source)
    settings: JudgeSettings = group(JudgeSettings)
    seeds: Sequence[int] = setting(
        (0,), parse=texts.seeds, typed=str, help="Draws of examples: `42,1024,0`."
    )
    split: str = setting("test", text(), help="train, validation or test.")
    max_test: int | None = setting(
        None, whole(optional=True), help="Most examples of each task, drawn with one seed [all]."
    )
    out: Path | None = setting(None, help="JSON file [RUN/compare.json].")
