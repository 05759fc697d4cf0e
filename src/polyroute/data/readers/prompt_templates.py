"""Prompt templates in the files of promptsource: `<dataset>/<subset>/templates.yaml`.

A template is Jinja text: the prompt, `|||`, the answer. It is rendered in a sandbox, and the YAML
file is read as plain values.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polyroute.data.records import cannot_read
from polyroute.errors import InputError, reason
from polyroute.host.paths import check_link
from polyroute.host.texts import read_text
from polyroute.host.yaml_files import PlainLoader, parse_yaml

__all__ = ["NO_INPUT", "NO_LABEL", "PromptTemplate", "read_templates"]

NO_INPUT, NO_LABEL = "<NO INPUT>", "<NO LABEL>"
"""They replace the prompt if a template yields nothing, and an empty answer."""

MOST = 100_000
"""Numbers in all ranges of a template, and characters or entries of a product."""
LARGE_WIDTH = re.compile(r"%(\(\w*\))?[-#0 +]*(\d{5}|\*)")
"""In a text whose `%` is the operator."""
_BAR = "|||"
_HIDDEN_BAR = "\ue000bar\ue000"  # private-use characters; hides bars in the data


class _TooLargeError(TemplateError):
    """A template asks for more than it may have."""


@dataclass(frozen=True)
class PromptTemplate:
    """One way to put an example into words."""

    name: str
    jinja: str
    answer_choices: str | None
    """Jinja text with `|||` between the choices."""
    original_task: bool
    """Whether it asks for what the data set is about."""
    path: Path
    """The file, for error messages."""

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row; `NO_INPUT` if the template yields nothing for it.

        Raises:
            InputError: the template cannot be rendered.
        """
        choices = [choice.replace(_BAR, _HIDDEN_BAR) for choice in self.choices(row) or []]
        parts = self._rendered(self.jinja, {**_hidden(row), "answer_choices": choices or None})
        return parts[0] if len(parts) > 1 and parts[0] else NO_INPUT

    def choices(self, row: Mapping[str, Any]) -> list[str] | None:
        """The answers to choose from; None if the template lists none.

        Raises:
            InputError: the template cannot be rendered.
        """
        if self.answer_choices is None:
            return None
        return self._rendered(self.answer_choices, _hidden(row))

    def _rendered(self, jinja: str, values: Mapping[str, Any]) -> list[str]:
        try:
            text = _ENVIRONMENT.from_string(jinja).render({"range": _bounded_range(), **values})
        except (_TooLargeError, MemoryError, RecursionError) as error:
            raise InputError(
                f"{self.path}: the template {self.name!r} asks for too much ({error}); take the "
                "templates of promptsource"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InputError(
                f"{self.path}: the template {self.name!r} cannot be rendered ({error}); check that "
                "its columns are those of the data"
            ) from error
        return [part.replace(_HIDDEN_BAR, _BAR).strip() for part in text.split(_BAR)]


def read_templates(folder: Path, dataset: str, subset: str | None) -> list[PromptTemplate]:
    """The templates of one data set, sorted by name.

    Raises:
        InputError: there is no such file, or it is malformed.
    """
    path = folder / dataset / (subset or "") / "templates.yaml"
    check_link(path)
    try:
        content = parse_yaml(read_text(path), str(path), _Loader)
        found = [
            PromptTemplate(
                name=str(entry["name"]),
                jinja=str(entry["jinja"]),
                answer_choices=entry.get("answer_choices"),
                original_task=bool((entry.get("metadata") or {}).get("original_task")),
                path=path,
            )
            for entry in content["templates"].values()
        ]
    except FileNotFoundError:
        raise InputError(
            f"there is no {path}; give the folder `templates` of promptsource, which has it"
        ) from None
    except OSError as error:
        raise cannot_read(path, error) from error
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a file of prompt templates ({reason(error, whole=True)})"
        ) from error
    return sorted(found, key=lambda template: template.name)


def _hidden(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.replace(_BAR, _HIDDEN_BAR) if isinstance(value, str) else value
        for name, value in row.items()
    }


class _Loader(PlainLoader):
    """Reads the two tags that occur in these files as plain mappings."""


def _plain(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _plain)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose products, powers and formats are bounded."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, unless the result may be large."""
        if operator == "*":
            pairs = ((left, right), (right, left))
            is_large = any(
                isinstance(many, Sized) and isinstance(times, int) and len(many) * times > MOST
                for many, times in pairs
            )
        elif operator == "**":
            is_large = any(
                isinstance(one, int | float) and abs(one) > most
                for one, most in ((left, 10**6), (right, 100))
            )
        else:
            is_large = isinstance(left, str) and LARGE_WIDTH.search(left) is not None
        if is_large:
            raise _TooLargeError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _bounded_range() -> Callable[..., range]:
    """`range` for one prompt, whose ranges have `MOST` numbers together."""
    left = MOST

    def bounded(*bounds: int) -> range:
        nonlocal left
        found = range(*bounds)
        left -= len(found)
        if left < 0:
            raise _TooLargeError(f"its ranges have more than {MOST:,} numbers")
        return found

    return bounded


_ENVIRONMENT = _Environment()
_ENVIRONMENT.globals["zip"] = zip
