"""What each command can be told, as frozen records; the command line makes its flags from them.

A field made by `setting` is one flag. A field made by `group` is a record of its own, whose fields
are flags too: so whatever `MHRConfig` and `AdaptSettings` declare is a flag of `polyroute train`
and `polyroute adapt`. `polyroute.program.options.flags` reads them.

These marks may be given to `setting`, besides those that `polyroute.settings` knows:

- `argument`: it has a place of its own on the command line, without a name;
- `parse`: from what was typed, and the name of the flag, to the value;
- `typed`: what is typed, where the type of the field does not say so;
- `values`: what shells complete to, or a function that knows;
- `recorded=False`: `run.json` does not keep it, so a resumed run may have another value;
- `from_start`: with `polyroute train --start` it comes from the other run (also of a group);
- `from_run`: where `polyroute evaluate` scores a run, it comes from the run (also of a group);
- `panel`: under which heading the help shows it (also of a group).
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from polyroute.host.dtypes import AUTO, DTYPES
from polyroute.kinds.names import PROMPTS
from polyroute.program import texts
from polyroute.program.recipes import recipe_names
from polyroute.settings import check_settings, flag, one_of, setting, text, whole

__all__ = [
    "CONFIG",
    "LIMITS",
    "OBJECTIVE",
    "READER",
    "REQUIRED",
    "RUN_HELP",
    "Given",
    "Limits",
    "Options",
    "PlannedOptions",
    "Reading",
    "RunOptions",
    "Source",
]

REQUIRED: Any = MISSING
RUN_HELP = (
    "Folder that `polyroute train` wrote or, where there is none, an id on the hub: "
    "user/inventory, or user/inventory@revision."
)


@dataclass(frozen=True)
class Given:
    """How the options of a command were given."""

    recorded: Mapping[str, Any] = field(default_factory=dict)
    """What `run.json` keeps of them, by flag, before anything that was left open is filled in."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What `recorded` would be where nothing is given."""
    places: Mapping[str, str] = field(default_factory=dict)
    """By flag, in words, where a value was given: on the command line or in a config file."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command has."""

    given: Given = field(default_factory=Given, compare=False)

    def __post_init__(self) -> None:
        """Check every value."""
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A suite, and which of its tasks."""

    data: str = setting(
        REQUIRED, text(),
        help="Suite: `starter`, a JSON, JSONL, CSV or Parquet file or a folder of them, a YAML "
        "file of hub data sets, or a copy of Super-NaturalInstructions or P3; see docs/data.md.",
    )  # fmt: skip
    tasks: Sequence[str] | None = setting(
        None, parse=texts.names, typed=str, help="Task names, separated by commas."
    )
    reader: Mapping[str, Any] | None = setting(
        None, parse=texts.reader, typed=list[str],
        help="Option of the suite's reader, such as seed=1024. Repeat for more.",
    )  # fmt: skip


READER: Any = Source.__dataclass_fields__["reader"].metadata


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most tokens that are read of an example."""

    max_input: int | None = setting(
        None,
        whole(optional=True),
        help="Most tokens of a prompt [the run's; a fresh run: 95 % fit].",
    )
    max_target: int | None = setting(
        None, whole(optional=True), help="Most tokens of a target or choice [as for prompts]."
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_settings(self)


LIMITS = tuple(one.name for one in fields(Limits))
"""Options that need not be those of the run that a command reads."""


@dataclass(frozen=True, kw_only=True)
class Reading(Limits):
    """How a base model is loaded, and how much it reads."""

    dtype: str = setting(
        "float32", text(), values=(AUTO, *DTYPES),
        help="Type of the base model: float32, bfloat16, float16, or auto: bfloat16 where the "
        "hardware multiplies it fast, else float32.",
    )  # fmt: skip
    prompt: str = setting(
        "auto", one_of(*PROMPTS),
        help="chat: by the model's chat template. plain: by the text alone. auto: chat if it has "
        "a template.",
    )  # fmt: skip
    system: str | None = setting(
        None, text(optional=True), help="System message of every chat [the template's own]."
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What to do with a run that is already in the folder."""

    resume: bool = setting(
        False, flag(), recorded=False, panel="Run", help="Continue the run in the --out folder."
    )
    overwrite: bool = setting(
        False, flag(), recorded=False, panel="Run", help="Replace the run in --out."
    )


@dataclass(frozen=True, kw_only=True)
class PlannedOptions(RunOptions):
    """A run that can be planned, and whose options can come from files."""

    dry_run: bool = setting(
        False, flag(), recorded=False, panel="Run",
        help="Check everything, print the plan, and write nothing.",
    )  # fmt: skip
    recipe: str | None = setting(
        None, panel="Run", values=recipe_names,
        help="Published settings as defaults: paper, paper-t0, paper-superni, or a YAML file.",
    )  # fmt: skip
    config: Path | None = setting(
        None, recorded=False, panel="Run",
        help="YAML file with any of these options; the command line wins.",
    )  # fmt: skip


CONFIG: Any = PlannedOptions.__dataclass_fields__["config"].metadata
OBJECTIVE: Any = {
    "check": text(),
    "help": "The loss: lm, t-few (compares choices) or superni (smoothed).",
    "values": ("lm", "t-few", "superni"),
}
"""The arguments of `setting` for fields of this kind in other records."""
