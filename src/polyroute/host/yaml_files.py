"""Reading YAML: plain values, without duplicate keys, and no more of them than the text shows."""

import re
from collections.abc import Hashable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from polyroute.errors import InputError, reason
from polyroute.host.json_text import DIGITS
from polyroute.host.texts import read_text

__all__ = ["PlainLoader", "parse_yaml", "read_yaml"]

MOST = 100_000
"""Values in a document. An alias stands for all that it names, so that a few lines of aliases of
aliases can stand for billions."""


def read_yaml(path: Path | Traversable, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping.

    Args:
        path: the file, which may be a resource of the package.
        what: the beginning of error messages.

    Raises:
        InputError: the file cannot be read, as `parse_yaml`, or does not hold a mapping.
    """
    try:
        text = read_text(path, "utf-8-sig")
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    content = parse_yaml(text, what) or {}
    if not isinstance(content, dict):
        raise InputError(f"{what} must hold `option: value` lines")
    return content


class PlainLoader(yaml.SafeLoader):
    """Reads plain values and refuses duplicate keys, which YAML forbids but its library allows."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node, whose keys are texts that differ."""
        seen = set()
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise InputError(f"a key in line {line} is a list or a mapping; write a text")
            if key in seen:
                raise InputError(
                    f"the key {key!r} in line {line} occurs twice; write each key once"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | str:
        """A whole number in base 2, 10 or 16; a time such as 12:30 is the text that it looks like.

        YAML 1.1 reads 12:30 in base 60, and 010 in base 8.
        """
        if ":" in node.value:
            return str(node.value)
        if re.fullmatch("[-+]?0[0-9_]+", node.value):
            raise InputError(
                f"the number {node.value} in line {node.start_mark.line + 1} begins with 0, as "
                "those in base 8 do; leave out the 0 or write it in quotes"
            )
        # The text first, since a long one takes long to compute.
        number = self.construct_yaml_int(node) if len(node.value) <= DIGITS else None
        if number is None or abs(number) >= 10**DIGITS:
            raise InputError(
                f"the number in line {node.start_mark.line + 1} has too many digits; write it in "
                "quotes"
            )
        return number

    def construct_fraction(self, node: yaml.ScalarNode) -> float | str:
        """A number with fractions; a time such as 12:30.5 is the text that it looks like."""
        return str(node.value) if ":" in node.value else self.construct_yaml_float(node)


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_number)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_fraction)


def parse_yaml(text: str, what: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """The value of a YAML text.

    Args:
        text: the text.
        what: the beginning of error messages.
        loader: knows further tags.

    Raises:
        InputError: the text is not YAML, has a key twice, a date or number that does not exist, or
            too many values.
    """
    reader: PlainLoader | None = None
    try:
        reader = loader(text)  # which refuses characters that YAML does not have
        node = reader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST:
            raise InputError(f"it stands for more than {MOST:,} values; write fewer aliases")
        return reader.construct_document(node)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(
            f"{what} is not valid YAML ({reason(error, whole=True)}); correct it"
        ) from error
    except RecursionError as error:
        raise InputError(f"{what} is not valid YAML: it is too deep; correct it") from error
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{what} has a date or a number that cannot be read ({error}); write it in quotes"
        ) from error
    except (KeyError, IndexError, AttributeError, TypeError) as error:  # a tag on another value
        raise InputError(
            f"{what} has a value that is not what its tag says ({error}); leave out the tag"
        ) from error
    finally:
        if reader is not None:
            reader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, those of its aliases each time that they occur."""
    if id(node) in known:
        if not known[id(node)]:
            raise InputError("an alias stands for itself; remove it")
        return known[id(node)]
    known[id(node)] = 0  # until all that it holds was counted
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    within = [part for one in parts for part in (one if isinstance(one, tuple) else (one,))]
    known[id(node)] = 1 + sum(_size(part, known) for part in within)
    return known[id(node)]
