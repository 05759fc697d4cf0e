"""Writes the notebooks in this folder from pages of the documentation, their only source.

python examples/notebooks.py
"""

import re
from pathlib import Path
from posixpath import normpath

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
PAGES = {"tutorial": "tutorial.md", "routes": "howto/routes.md"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$\n?", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)")


def notebook_of(page: str) -> nbformat.NotebookNode:
    """A page as a notebook of text, Python code, and `polyroute` commands for the shell."""
    text = (DOCS / page).read_text(encoding="utf-8")
    folder = ("../docs" / Path(page).parent).as_posix()
    cells = []
    end = 0
    for match in BLOCK.finditer(text):
        cells.append(_prose(text[end : match.start()], folder))
        language, code = match.groups()
        if language == "sh":
            code = re.sub(r"^polyroute ", "!polyroute ", code, flags=re.MULTILINE)
        cells.append(new_code_cell(code.rstrip("\n")))
        end = match.end()
    cells.append(_prose(text[end:], folder))
    cells = [cell for cell in cells if cell.source]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the random ids of nbformat would change the file every time
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def _prose(text: str, folder: str) -> nbformat.NotebookNode:
    moved = LINK.sub(lambda match: normpath(f"{folder}/{match[1]}"), text)
    return new_markdown_cell(moved.strip())


if __name__ == "__main__":
    for name, page in PAGES.items():
        nbformat.write(notebook_of(page), FOLDER / f"{name}.ipynb")
