"""Presets: experiments as YAML files in the folder `presets`, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from typing import Any, get_args

from polyroute.config import Phase
from polyroute.errors import InputError, did_you_mean
from polyroute.host.yaml_files import read_yaml
from polyroute.program.recipes import shipped
from polyroute.settings import SEEDS, Check, setting

__all__ = ["Preset", "preset_names", "read_preset"]

SCORES = ("score", "score_normalised")
SEEDS_OF = ("draw", "reader")
OF_THE_PRESET = {
    "train": ("data", "model", "out", "reader", "start"),
    "adapt": ("data", "out", "phase", "reader", "run", "seeds", "shots", "tasks"),
}
"""Options that every stage gets from the preset itself."""
OF_A_CALL = ("dry-run", "json", "overwrite", "quiet", "resume", "verbose")
"""Options that say how a command is called, and not what it does."""


# ------------------------------------------------------------------ checks of values


def _of(types: Any, words: str) -> Check:
    """A value of one of these types; `words` end the sentence that it must be such."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, types):
            raise InputError(f"{name} must {words}, not {value!r}")
        return value

    return check


def _mapping(*, nested: bool = False) -> Check:
    """Names with their values; with `nested` each value is such a mapping too."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, dict) or (
            nested and not all(isinstance(entry, dict) for entry in value.values())
        ):
            raise InputError(f"{name} must map names to values, not be {value!r}")
        return value

    return check


def _either(*values: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if value not in values:
            raise InputError(f"{name} must be {' or '.join(values)}, not {value!r}")
        return value

    return check


def _seeds(name: str, value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(type(s) is int for s in value):
        raise InputError(f"{name} must be a list of whole numbers such as [42, 0], not {value}")
    if len(set(value)) < len(value) or not all(0 <= seed < SEEDS for seed in value):
        raise InputError(f"{name} must be different numbers from 0 to {SEEDS - 1}, not {value}")
    return value


def _tasks(name: str, value: Any) -> Any:
    is_list = isinstance(value, list) and value and all(isinstance(task, str) for task in value)
    if value is not None and not is_list:
        raise InputError(f"{name} must be a list such as [rte, cb], not {value!r}")
    return value


def _least(name: str, value: Any) -> Any:
    if type(value) is not int or value < 0:
        raise InputError(f"{name} must be a whole number, 0 or more, not {value!r}")
    return value


def _methods(name: str, value: Any) -> Any:
    for method, content in _mapping(nested=True)(name, value).items():
        if content.keys() != {"title", "train", "phases"}:
            raise InputError(f"the method {method!r} must have a title, train and phases")
        phases = content["phases"]
        known = get_args(Phase)
        if not isinstance(phases, list) or not all(phases.count(p) == 1 == known.count(p)
                                                   for p in phases):  # fmt: skip
            raise InputError(
                f"the phases of the method {method!r} must be a list of some of "
                f"{', '.join(known)}, each once, not {phases!r}"
            )
    return value


def _selection(name: str, value: Any) -> Any:
    for choice, content in _mapping(nested=True)(name, value).items():
        if content.keys() != {"adapt", "says"}:
            raise InputError(f"the selection {choice!r} must have adapt and says")
    return value


# ------------------------------------------------------------------ presets


def _entry(check: Check) -> Any:
    return setting(MISSING, check)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One experiment, as a file in the folder `presets` says it.

    Raises:
        InputError: a value is of another form.
    """

    about: str = _entry(_of(str, "be a sentence"))
    needs: str = _entry(_of(str, "be a sentence"))
    """What to download, and where it must lie."""
    model: str = _entry(_of(str, "be a name"))
    models: Mapping[str, Mapping[str, Any]] = _entry(_mapping(nested=True))
    """Options of training that depend on the base model."""
    data: str | None = _entry(_of(str | None, "be a suite"))
    """The suite; None where it has to be given."""
    reader: Mapping[str, Any] = _entry(_mapping())
    """Options of the suite's reader; MODEL stands for the base model."""
    recipe: str = _entry(_of(str, "be a name"))
    train: Mapping[str, Any] = _entry(_mapping())
    """Options of training besides those of the recipe, for every method and model."""
    adapt: Mapping[str, Any] = _entry(_mapping())
    """Options of adaptation besides those of the recipe, for every method and phase."""
    methods: Mapping[str, Mapping[str, Any]] = _entry(_methods)
    """By name: `title`, options of `train`, and the `phases` of adaptation."""
    zero_shot: bool = _entry(_of(bool, "be true or false"))
    """Whether to score the average of the skills as it is."""
    mu_training: Mapping[str, Any] = _entry(_mapping())
    """Options with which the average is trained further on the training tasks, for methods with a
    phase mu, before it is scored so once more; nothing is trained further where this is empty."""
    tasks: Sequence[str] | None = _entry(_tasks)
    """The held-out tasks; None for all of the suite."""
    least: int = _entry(_least)
    """Examples that a held-out task must have."""
    shots: int | Mapping[str, int] = _entry(_of(int | dict, "be a number, or one for each task"))
    """Training examples, of every task or of each."""
    seeds: Sequence[int] = _entry(_seeds)
    seeds_of: str = _entry(_either(*SEEDS_OF))
    """What a seed chooses: `draw`, the examples drawn from the training split; or `reader`, what
    the reader of the suite puts there."""
    score: str = _entry(_either(*SCORES))
    """Which score of a result counts."""
    selection: Mapping[str, Mapping[str, Any]] = _entry(_selection)
    """By name: options of `adapt` that choose the best step, each a value or one for each number of
    shots; and what that `says`."""
    says: Sequence[str] = _entry(_of(list, "be a list of sentences"))
    """Where it differs from the published runs."""
    quick: Mapping[str, Any] = _entry(_mapping())
    """What `--quick` sets."""
    reference: Mapping[str, Any] | None = _entry(_of(dict | None, "have source, columns and rows"))
    """Published numbers: their `source`, `columns`, and `rows` by method and phase."""

    def __post_init__(self) -> None:
        """Check what the run relies on."""
        for one in fields(self):
            one.metadata["check"](_key(one.name), getattr(self, one.name))
        for task in self.tasks or ():
            if isinstance(self.shots, dict) and task not in self.shots:
                raise InputError(f"shots has no number for the task {task!r}; add shots.{task}")


def _key(name: str) -> str:
    """What a preset calls one of its fields."""
    return name.replace("_", "-")


def _check_option(place: str, path: Sequence[str], option: str) -> None:
    """Refuse options of stages that would be overruled, or would change how all of it runs."""
    section = path[-1] if path and path[-1] in OF_THE_PRESET else ""
    if section and option in OF_A_CALL:
        raise InputError(f"{place} cannot be set: give --{option} to `polyroute reproduce` itself")
    if option in OF_THE_PRESET.get(section, ()):
        raise InputError(
            f"{place} cannot be set, because every stage gets its {option} from the preset: see "
            "--data, --model and --out, and the values of the preset itself"
        )


def preset_names() -> tuple[str, ...]:
    """The presets that polyroute brings."""
    return shipped("presets")


def read_preset(name: str, settings: Mapping[str, Any] | None = None) -> Preset:
    """A preset by its name, with some of its values replaced.

    Args:
        name: the preset's name.
        settings: values by place, such as `shots` or `methods.mhr.train.heads`. What begins with
            `train.` or `adapt.` may be any option of that command.

    Raises:
        InputError: there is no such preset, or no such place in it.
    """
    if name not in preset_names():
        raise InputError(f"there is no preset {name!r}; {did_you_mean(name, preset_names())}")
    content = read_yaml(
        files("polyroute.program") / "presets" / f"{name}.yaml", f"the preset {name}"
    )
    known = {_key(one.name) for one in fields(Preset)}
    for place, value in (settings or {}).items():
        *path, last = place.split(".")
        _check_option(place, path, last.replace("_", "-"))
        where: Any = content
        for part in path:
            where = where.get(part) if isinstance(where, dict) else None
        if not isinstance(where, dict) or (last not in where and not path):
            raise InputError(
                f"the preset {name} has no {place!r} to set; {did_you_mean(place, known)}, and "
                "options of training and adaptation as train.OPTION and adapt.OPTION"
            )
        where[last] = value
    if content.keys() != known:
        wrong = sorted(content.keys() ^ known)
        raise InputError(f"the preset {name} must have exactly its known keys, see {wrong}")
    return Preset(**{key.replace("-", "_"): value for key, value in content.items()})
