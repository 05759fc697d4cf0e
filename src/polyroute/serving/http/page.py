"""The page for trying tasks in a browser, from files of the package."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

__all__ = ["FILES", "router"]

FOLDER = Path(__file__).parents[1] / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
"""By the end of a file's name; some systems have other ideas of it."""
FILES = {
    "/" if file.name == "index.html" else f"/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in KINDS
}
"""What there is at each address, so that no address is made into the name of a file."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "Cache-Control": "no-cache",
}
"""The page takes nothing from elsewhere, and nobody can put it into a page of theirs."""
router = APIRouter(include_in_schema=False)


def _route(file: Path) -> Callable[[], Coroutine[Any, Any, Response]]:
    """The route of one file."""

    async def answer() -> Response:
        return Response(file.read_bytes(), media_type=KINDS[file.suffix], headers=HEADERS)

    return answer


for address, each in FILES.items():
    router.add_api_route(address, _route(each), methods=["GET"])
