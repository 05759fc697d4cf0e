"""Runs that commands read: their inventory, and the base model it was trained on."""

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from polyroute.errors import InputError
from polyroute.host.dtypes import AUTO, DTYPES, settled_dtype
from polyroute.host.memory import bound
from polyroute.host.output import mode, say
from polyroute.kinds.base import MAX_INPUT, MAX_TARGET
from polyroute.kinds.choose import ChatTemplate, ModelKind, kind_of
from polyroute.kinds.objectives import Objective
from polyroute.loading import load_base
from polyroute.program.options.shared import LIMITS, Given, Limits, Reading
from polyroute.saved.checkpoint import Checkpoint, read_checkpoint
from polyroute.saved.hub import DESCRIPTION, Snapshot, locate
from polyroute.saved.runs import BEFORE, read_run

__all__ = [
    "BaseModel",
    "base_of",
    "beside",
    "inventory_of",
    "kind_for",
    "limits_of",
    "load",
    "settled",
]

WITHOUT_DATA = {"max_input": MAX_INPUT, "max_target": MAX_TARGET}
"""The most tokens that are read where there is no data to choose them by."""


@dataclass(frozen=True)
class BaseModel:
    """A base model by its name, and how it is loaded and reads."""

    name: str
    reading: Reading

    @classmethod
    def of(cls, run: str | os.PathLike[str]) -> "BaseModel":
        """What a run of `polyroute train` or `import` says of its base model.

        Raises:
            InputError: the folder is no run's, or the run says nothing of a base model.
        """
        config = {**BEFORE, **read_run(run)["config"]}
        kinds: dict[str, Any] = {"model": str, **{one.name: one.type for one in fields(Reading)}}
        kinds |= dict.fromkeys(WITHOUT_DATA, int)  # a run has settled them
        for name, kind in kinds.items():
            if name not in config:
                raise InputError(
                    f"{Path(run) / 'run.json'} does not say {name!r}, so `polyroute train` did not "
                    "write it, or it is damaged"
                )
            is_its = type(config[name]) in (get_args(kind) or (kind,))
            if not is_its or (name in WITHOUT_DATA and config[name] < 1):
                raise InputError(f"{Path(run) / 'run.json'} is damaged: {name} is {config[name]!r}")
        return cls(
            config["model"], Reading(**{one.name: config[one.name] for one in fields(Reading)})
        )

    def to_dict(self) -> dict[str, Any]:
        """The options of `polyroute train` that it stands for."""
        return {"model": self.name, **asdict(self.reading)}


def settled(
    reading: Reading, given: Given, resumed: str | os.PathLike[str] | None = None
) -> tuple[Reading, Given]:
    """What was asked for, with the type that `--dtype auto` comes to.

    What was not asked for of a run that an older version began stays as that version did it.

    Args:
        reading: how a base model is to be loaded.
        given: what `run.json` is to keep of it.
        resumed: the run that is resumed, whose type stays; None of a fresh run.
    """
    known = None if resumed is None else read_run(resumed)["config"]
    if known is not None:
        former: dict[str, Any] = {
            k: v for k, v in BEFORE.items() if k not in known and k not in given.places
        }
        reading = replace(reading, **former)
        given = replace(given, recorded={**given.recorded, **former})
    if reading.dtype != AUTO:
        return reading, given
    dtype = here = settled_dtype(AUTO)
    does = "multiplies" if here == "bfloat16" else "does not multiply"
    why = f"this hardware {does} bfloat16 fast"
    before = None if known is None else known.get("dtype", BEFORE["dtype"])
    if before in DTYPES:
        dtype, why = before, f"the run in {resumed} was started with it"
        if before != here:
            why += f", although this hardware would have {here}"
    say(f"--dtype auto is {dtype}: {why}")
    recorded = {**given.recorded, "dtype": dtype}
    return replace(reading, dtype=dtype), replace(given, recorded=recorded)


def load(base: BaseModel, *, objective: str | Objective = "lm") -> tuple[Any, ModelKind]:
    """Load a base model, and find its kind.

    Args:
        base: which.
        objective: what it is to learn by.

    Raises:
        InputError: it cannot be loaded, or cannot learn by this objective.
    """
    model, tokenizer = load_base(
        base.name, dtype=base.reading.dtype, trust_remote_code=mode.trust_remote_code
    )
    if not torch.accelerator.is_available():
        bound()
    return model, kind_for(model, tokenizer, base.reading, objective)


def kind_for(model: Any, tokenizer: Any, reading: Reading, objective: str | Objective) -> ModelKind:
    """The kind of a base model that is to be read so; limits that are open are those without data.

    Raises:
        InputError: the model cannot be read so, or cannot learn by this objective.
    """
    prompt: str | ChatTemplate = reading.prompt
    if reading.system is not None:
        if prompt == "plain":
            raise InputError("--system is for chats: leave it out with --prompt plain")
        prompt = ChatTemplate(tokenizer, reading.system)
    limits = limits_of(reading)
    return kind_of(model, tokenizer, **limits, objective=objective, prompt=prompt)


def limits_of(reading: Reading) -> dict[str, int]:
    """The most tokens that are read; what is open is as where there is no data."""
    return {name: getattr(reading, name) or limit for name, limit in WITHOUT_DATA.items()}


def base_of(
    run: str | os.PathLike[str],
    *,
    objective: str | Objective = "lm",
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> tuple[Any, ModelKind]:
    """The base model that a run was trained on, and its kind, to learn by an objective.

    Args:
        run: the folder of the run.
        objective: what it is to learn by.
        limits: the most tokens to read; what they leave open is as in the run.

    Raises:
        InputError: the run says nothing of a base model, or see `load`.
    """
    base = BaseModel.of(run)
    own = {name: getattr(limits, name) for name in LIMITS}  # `limits` may say more, as `Reading`
    given = {name: limit for name, limit in own.items() if limit is not None}
    reading = replace(base.reading, **given)
    return load(replace(base, reading=reading), objective=objective)


def inventory_of(run: Path) -> Checkpoint:
    """The inventory of a run that is finished.

    Raises:
        InputError: the run is not finished, or its command leaves no inventory.
    """
    if (run / "run.json").is_file() and not (run / DESCRIPTION).exists():
        command = read_run(run)["command"]
        if command == "import":
            raise InputError(f"the import to {run} was interrupted; repeat it with --overwrite")
        if command != "train":
            raise InputError(f"{run} was written by `polyroute {command}`, not `polyroute train`")
        raise InputError(f"the run in {run} is unfinished; continue it with --resume")
    return read_checkpoint(run)


def beside(run: Path) -> Path:
    """The folder of a run, if results can go into it.

    Raises:
        InputError: the run is on the hub.
    """
    if isinstance(locate(run), Snapshot):
        raise InputError(f"{run} is on the hub: say with --out where the results go")
    return run
