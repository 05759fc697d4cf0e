"""The docs site builds without a warning, needs no network, and its pictures and names are true."""

import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import polyroute

ROOT = Path(__file__).parents[1]
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Where a page says what a browser fetches by itself."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Fetched(HTMLParser):
    """Collects the addresses that a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag in FETCHED and values.get("rel") != "canonical":
            self.addresses.append(values.get(FETCHED[tag]) or "")


def test_every_page_fetches_from_the_site_alone_and_what_it_fetches_is_there(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "unpkg" not in text  # what the theme would load itself
        parser = Fetched()
        parser.feed(text)
        for address in parser.addresses:
            assert not re.match(r"(\w+:)?//", address), f"{page.name} fetches {address}"
            path = address.partition("#")[0].partition("?")[0]
            if path and page.name != "404.html":
                assert (page.parent / path).exists(), f"{page.name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text(encoding="utf-8"))


def test_the_first_page_is_the_readme_with_its_picture_and_links(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="idea.svg"' in text
    assert 'href="data.html"' in text
    for link in re.findall(r"href=\"(repository/[^\"#]+)", text):
        assert (site / link).exists(), link


def test_files_outside_docs_that_pages_link_to_come_along(site: Path) -> None:
    assert (site / "repository" / "benchmarks" / "results" / "step_time.json").is_file()
    assert "../repository/" not in (site / "scaling.html").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    ids = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="(polyroute\.[\w.]+)"', text)}
    assert set(polyroute.__all__) <= ids
    assert "Raises:" in text  # sections of the docstrings are read


def test_the_pictures_of_the_concepts_are_what_their_script_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ROOT / "docs" / "figures"
    script = runpy.run_path(str(folder / "concepts.py"))
    for draw in script["PICTURES"]:
        monkeypatch.setitem(draw.__globals__, "FOLDER", tmp_path)
        draw()
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in drawn] == sorted(p.name for p in folder.glob("concept-*.svg"))
    for path in drawn:
        assert path.read_text() == (folder / path.name).read_text(), path.name


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == polyroute.__version__
