"""The list of bugs that `scripts/plant_bugs.py` plants, against the source that it changes."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plant_bugs.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("plant_bugs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("bug", _script().BUGS, ids=lambda bug: bug.name)
def test_it_can_be_planted_in_the_present_source(bug: Any, tmp_path: Path) -> None:
    script = _script()
    copy = script.copied(tmp_path)
    script.plant(bug, copy)
    assert (copy / bug.file).read_text() != (script.PACKAGE / bug.file).read_text()
