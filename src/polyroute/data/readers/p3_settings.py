"""What a user can choose about T0's tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyroute.errors import InputError
from polyroute.settings import check_settings, flag, one_of, setting, whole

__all__ = ["P3Settings"]


def _folder(name: str, value: Any) -> Path | None:
    if not isinstance(value, str | Path | None):
        raise InputError(f"{name} must be a folder, not {value!r}")
    return Path(value) if value else None


def _counts(name: str, value: Any) -> Mapping[str, int]:
    if not isinstance(value, Mapping | None):
        raise InputError(f"{name} must be numbers by task, such as {{'copa': 32}}, not {value!r}")
    at_least_one = whole(1)
    return {task: at_least_one(f"{name} of {task}", count) for task, count in (value or {}).items()}


@dataclass(frozen=True, kw_only=True)
class P3Settings:
    """Settings of `polyroute.data.readers.p3.P3Suite`.

    Raises:
        InputError: a value is not what the setting allows.
    """

    few_shot: str | Path | None = setting(None, _folder)
    """A folder of few-shot files; None for `few_shot` in the source."""
    templates: str | Path | None = setting(None, _folder)
    """A folder of promptsource files; None for `templates` in the source."""
    raw: str | Path | None = setting(None, _folder)
    """A folder of held-out data sets; None for `raw` in the source."""
    tasks: Literal["template", "dataset"] = setting("template", one_of("template", "dataset"))
    """What a training task is: one template, or one data set with all of its templates."""
    seed: int = setting(42, whole(0))
    """Selects the few-shot files and seeds every random choice."""
    validation: int = setting(100, whole(0))
    """The number of rows of each template that are drawn at random for validation."""
    per_template: int | None = setting(None, whole(1, optional=True))
    """The most training rows of each template, drawn at random; None for all rows."""
    shots: Mapping[str, int] | None = setting(None, _counts)
    """By held-out task, a number of shots that replaces the published one."""
    resample: bool = setting(False, flag())
    """Draw the shots from the training split instead of reading few-shot files."""
    all_templates: bool = setting(False, flag())
    """Show a held-out example in every template instead of in one that is drawn for it."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)
