"""Reading YAML files: plain values only, a mapping at the top, no key twice."""

from collections.abc import Hashable
from typing import Any

import yaml

from polyroute.errors import InputError

__all__ = ["read_yaml"]


def read_yaml(path: Any, what: str) -> dict[str, Any]:
    """A YAML file that holds a mapping; an empty one is an empty mapping.

    Args:
        path: of the file, also within the package.
        what: begins the sentence of an error.

    Raises:
        InputError: the file cannot be read, says a key twice, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader) or {}
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} is not valid YAML ({reason}); correct it") from error
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{what} must hold `option: value` lines")
    return content


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice: YAML's own rule, which its library does not check."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                line = key_node.start_mark.line + 1
                raise InputError(f"the key {key!r} in line {line} is there twice; name each once")
            seen.add(key)
        return super().construct_mapping(node, deep)
