"""Stages: the commands that a preset comes to, each with a folder or file of its own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.program.recipes import SECTIONS
from polyroute.program.reproduce.preset import Preset
from polyroute.program.stages import Stage

__all__ = ["MethodPlan", "Plan", "Way", "readers_of"]


@dataclass(frozen=True)
class Way:
    """One line of the results: a method in a phase, with the stages that score it."""

    method: str
    phase: str
    stages: Sequence[Stage]


@dataclass(frozen=True)
class MethodPlan:
    """The training of a method, and the ways in which it is then scored."""

    method: str
    train: Stage
    ways: Sequence[Way]

    @property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        return [self.train, *(stage for way in self.ways for stage in way.stages)]


def readers_of(preset: Preset) -> list[dict[str, Any]]:
    """The options of the suite's reader for each group of seeds that is adapted at once."""
    common = {k: preset.model if v == "MODEL" else v for k, v in preset.reader.items()}
    if preset.seeds_of == "draw":
        return [common]
    return [{**common, "seed": seed} for seed in preset.seeds]


class Plan:
    """What a preset comes to in a folder.

    Args:
        preset: with all values replaced.
        folder: the folder of the run; each method has a folder in it.
        selection: how the best step of an adaptation is chosen.
        tasks: the held-out tasks; None for all that the base model can use.
        given: what was set by hand, by place, which wins over what the preset says of a method or
            a model.
    """

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        selection: str,
        tasks: Sequence[str] | None,
        given: Mapping[str, Any],
    ) -> None:
        self.preset, self.folder, self.tasks = preset, folder, tasks
        self.selection = preset.selection[selection]["adapt"]
        self.by_hand = {
            section: _options(
                {
                    place.partition(".")[2]: value
                    for place, value in given.items()
                    if place.startswith(f"{section}.")
                }
            )
            for section in SECTIONS
        }
        self.readers = [
            [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items()]
            for options in readers_of(preset)
        ]

    def of(self, method: str) -> MethodPlan:
        """The stages of a method."""
        train = self._training(method)
        phases = self.preset.methods[method]["phases"]
        adapted = [Way(method, phase, self._adaptations(method, phase)) for phase in phases]
        return MethodPlan(method, train, [*self._zero_shot(method, train), *adapted])

    def _training(self, method: str) -> Stage:
        preset, run = self.preset, self.folder / method
        options = {
            "recipe": preset.recipe,
            "model": preset.model,
            "data": preset.data,
            "reader": self.readers[0],
            **_options(preset.models.get(preset.model, {})),
            **_options(preset.train),
            **_options(preset.methods[method]["train"]),
            **self.by_hand["train"],
            "out": str(run),
        }
        return Stage("train", options, run / "metrics.json")

    def _zero_shot(self, method: str, train: Stage) -> list[Way]:
        """The average of the skills, scored as it is and after some more training."""
        preset = self.preset
        if not preset.zero_shot:
            return []
        ways = [Way(method, "zero-shot", [self._scoring(self.folder / method)])]
        phases = [p for p in preset.methods[method]["phases"] if p in ("mu", "mu-uncollapsed")]
        if preset.mu_training and phases:
            place = self.folder / f"{method}-mu"
            further = {
                **train.options, "start": str(self.folder / method), "phase": phases[0],
                **_options(preset.mu_training), "out": str(place),
            }  # fmt: skip
            stages = [Stage("train", further, place / "metrics.json"), self._scoring(place)]
            ways.append(Way(method, "zero-shot, mu trained further", stages))
        return ways

    def _scoring(self, run: Path) -> Stage:
        result = run / "zero-shot.json"
        options = {
            "run": str(run), "data": self.preset.data, "reader": self.readers[0],
            "zero_shot": True, "tasks": None if self.tasks is None else list(self.tasks),
            "out": str(result),
        }  # fmt: skip
        return Stage("evaluate", options, result)

    def _adaptations(self, method: str, phase: str) -> list[Stage]:
        """One stage for each reader of the suite and each number of shots."""
        preset, run = self.preset, self.folder / method
        is_drawn = preset.seeds_of == "draw"
        stages = []
        for number, reader in enumerate(self.readers):
            seeds = list(preset.seeds) if is_drawn else [preset.seeds[number]]
            for shots, group in self._by_shots().items():
                place = run / "-".join([phase, str(shots), *([] if is_drawn else map(str, seeds))])
                options = {
                    "recipe": preset.recipe,
                    "run": str(run),
                    "data": preset.data,
                    "reader": reader,
                    "phase": phase,
                    "tasks": group,
                    "shots": shots,
                    **_options(preset.adapt),
                    **_for_shots(self.selection, shots),
                    **self.by_hand["adapt"],
                    "seeds": seeds,
                    "out": str(place),
                }
                stages.append(Stage("adapt", options, place / "results.json"))
        return stages

    def _by_shots(self) -> dict[int, list[str] | None]:
        """The tasks that get each number of shots; they are adapted side by side."""
        shots, tasks = self.preset.shots, self.tasks
        if isinstance(shots, int):
            return {shots: None if tasks is None else list(tasks)}
        if tasks is None:
            raise InputError("shots names tasks, so tasks must too: add --set tasks=[...]")
        found: dict[int, list[str] | None] = {}
        for task in tasks:
            found[shots[task]] = [*(found.get(shots[task]) or []), task]
        return found


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of their flags with underscores, so that one layer replaces another."""
    return {name.replace("-", "_"): value for name, value in options.items()}


def _for_shots(options: Mapping[str, Any], shots: int) -> dict[str, Any]:
    """The options where some have a value for each number of shots."""
    found = _options(options)
    for name, value in found.items():
        if isinstance(value, dict):
            if shots not in value:
                raise InputError(
                    f"the preset has no {name} for {shots} shots; set it: --set adapt.{name}=..."
                )
            found[name] = value[shots]
    return found
