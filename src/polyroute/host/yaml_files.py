"""Reading YAML files: a mapping of plain values, without duplicate keys."""

from collections.abc import Hashable
from typing import Any

import yaml

from polyroute.errors import InputError, reason

__all__ = ["read_yaml"]


def read_yaml(path: Any, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping.

    Args:
        path: the file, which may be a resource of the package.
        what: the beginning of error messages.

    Raises:
        InputError: the file cannot be read, has a duplicate key, or does not hold a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader) or {}
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"{what} is not valid YAML ({reason(error, whole=True)}); correct it"
        ) from error
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{what} must hold `option: value` lines")
    return content


class _Loader(yaml.SafeLoader):
    """Reads plain values and refuses duplicate keys, which YAML forbids but its library allows."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                line = key_node.start_mark.line + 1
                raise InputError(
                    f"the key {key!r} in line {line} occurs twice; write each key once"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
