"""What fuzzing found, and whole files: each ends well or in a sentence."""

from pathlib import Path

import pytest
from harnesses import HARNESSES, holds, seeds

CORPUS = Path(__file__).parent / "fuzz"
FOUND = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("path", FOUND, ids=[str(path.relative_to(CORPUS)) for path in FOUND])
def test_what_was_found_ends_in_a_sentence(path: Path, tmp_path: Path) -> None:
    holds(HARNESSES[path.parent.name], path.read_bytes(), tmp_path / "case")


@pytest.mark.parametrize("name", sorted(HARNESSES))
def test_whole_files_and_cut_ones(name: str, tmp_path: Path) -> None:
    whole = seeds(name, tmp_path / "case")
    assert whole
    for data in whole:
        HARNESSES[name](data, tmp_path / "case")  # it gets behind every check
    for data in (b"", *whole):
        for length in (len(data) // 2, 1):
            holds(HARNESSES[name], data[:length], tmp_path / "case")
