"""The most tokens that a run reads of prompts and targets: as given, or as its data asks for."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyroute.data.suite import Suite
from polyroute.host.output import say
from polyroute.kinds.choose import ModelKind
from polyroute.program.commands.runs import kind_for
from polyroute.program.options.shared import Given, Reading
from polyroute.saved.runs import read_run
from polyroute.settings import typed
from polyroute.study.lengths import SHARE, chosen_limit, usual_lengths

__all__ = ["Measured", "settled_lengths"]

MOST = {"max_input": 1024, "max_target": 256}
"""The largest limits that are chosen, which bounds the memory of a batch; users may give more."""
OF = {"max_input": "prompts", "max_target": "targets and choices"}


@dataclass(frozen=True)
class Measured:
    """The examples that limits are chosen for."""

    suite: Suite
    tasks: Sequence[str]
    split: str


def settled_lengths(
    model: Any,
    kind: ModelKind,
    reading: Reading,
    given: Given,
    measured: Measured,
    resumed: str | os.PathLike[str] | None = None,
) -> tuple[ModelKind, Reading, Given]:
    """The kind with the limits that were asked for or, where they were left open, that suit data.

    Args:
        model: the base model.
        kind: its kind, whatever its limits are.
        reading: what was asked for.
        given: what `run.json` is to keep of it.
        measured: the examples that are to fit.
        resumed: the run that is resumed, whose limits stay; None of a fresh run.
    """
    left_open = [name for name in MOST if getattr(reading, name) is None]
    if not left_open:
        return kind, reading, given
    limits: dict[str, Any] | None = _as_before(resumed, left_open)
    if limits is None:
        limits = _measured(kind, reading, measured, left_open)
    reading = replace(reading, **limits)
    given = replace(given, recorded={**given.recorded, **limits})
    return kind_for(model, kind.tokenizer, reading, kind.objective), reading, given


def _as_before(
    resumed: str | os.PathLike[str] | None, names: Sequence[str]
) -> dict[str, int] | None:
    """The limits of the run that is resumed; None where it does not say them."""
    if resumed is None:
        return None
    config = read_run(resumed)["config"]
    limits = {name: config.get(name) for name in names}
    if not all(type(limit) is int for limit in limits.values()):
        return None
    for name, limit in limits.items():
        say(f"{typed(name)} is {limit}: the run in {resumed} was started with it")
    return limits


def _measured(
    kind: ModelKind, reading: Reading, measured: Measured, names: Sequence[str]
) -> dict[str, int]:
    """The limits that suit the data, the base model and the memory; says which and why."""
    usual = usual_lengths(measured.suite, measured.tasks, measured.split, kind)
    room = kind.max_positions
    if kind.one_sequence:
        left = room - (reading.max_input or room)
        room = left if left > 1 else room // 2
    target = reading.max_target or _limit("max_target", usual.target, room)
    if kind.one_sequence:
        room = kind.max_positions - target
    limits = {"max_input": _limit("max_input", usual.prompt, room), "max_target": target}
    lengths = {"max_input": usual.prompt, "max_target": usual.target}
    for name in names:
        option, limit = typed(name), limits[name]
        seen = " in a sample" if usual.is_sample else ""
        why = (
            f"{SHARE} % of the {OF[name]} of every task{seen} have at most {lengths[name]:,} tokens"
        )
        if limit >= lengths[name]:
            say(f"{option} is {limit}: {why}")
        elif limit < MOST[name]:
            say(f"{option} is {limit}, as the base model has no more room: {why}")
        else:
            say(f"{option} is {limit}, the most that is chosen: {why}; give {option} to read more")
    return {name: limits[name] for name in names}


def _limit(name: str, length: int, room: int) -> int:
    return max(2, chosen_limit(length, min(MOST[name], room)))
