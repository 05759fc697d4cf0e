"""Hooks of the docs site (mkdocs.yml): one text serves the repository's pages and the site.

The README is the first page. Pages may link to files of the repository outside `docs/`, as they
must on the repository's own pages; the site carries those files along, under `repository/`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")
"""The path of a relative link, without its anchor."""


def on_files(files: Files, config: Any) -> Files:
    """Add the first page, and what pages link to outside `docs/`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    pages = [file for file in files if file.is_documentation_page()]
    for page in pages:  # which grows: what comes along may link further
        for path in _outside(page):
            uri = f"repository/{path}"
            if files.get_file_from_path(uri) is None:
                file = File.generated(config, uri, abs_src_path=str(ROOT / path))
                files.append(file)
                pages += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point every relative link of a page at the place that its target has on the site."""
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        return relpath(_on_site(_in_repository(uri, match[1])), Path(uri).parent.as_posix())

    return LINK.sub(moved, markdown)


def _outside(file: File) -> Iterator[str]:
    for link in LINK.findall(file.content_string):
        path = _in_repository(file.src_uri, link)
        if _on_site(path).startswith("repository/") and (ROOT / path).is_file():
            yield path


def _in_repository(uri: str, link: str) -> str:
    """The path, from the root of the repository, that a link of a page means there."""
    if uri == "index.md":
        uri = "repository/README.md"
    inside = uri.removeprefix("repository/")
    folder = Path(inside).parent if inside != uri else "docs" / Path(uri).parent
    return normpath((folder / link).as_posix())


def _on_site(path: str) -> str:
    if path == "README.md":
        return "index.md"
    inside = path.removeprefix("docs/")
    return inside if inside != path else f"repository/{path}"
