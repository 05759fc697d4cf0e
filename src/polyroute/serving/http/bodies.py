"""Bodies of requests: how large they may be, and what is JSON."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyroute.errors import InputError
from polyroute.host.json_text import parse_json
from polyroute.serving.http.errors import GoneError, OverdueError, Refusal

__all__ = ["BodyLimit", "JsonRoute"]


class BodyLimit:
    """Refuses requests with large bodies.

    Starlette's own limit answers in plain text, which OpenAI's clients do not read.

    Args:
        app: what is asked.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = HTTPException(
            413, f"the body is larger than the {self.most} bytes that the server takes"
        )
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.most:
            await Refusal(413, too_large.detail).response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise too_large
            return message

        await self.app(scope, counted, send)


class JsonRoute(APIRoute):
    """A route that takes JSON, says what is wrong with it, and takes it under no other name.

    A page of another site can send a form or plain text to a server on the visitor's machine
    without asking, but not JSON.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that FastAPI calls."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            asked = _JsonRequest(request.scope, request.receive)
            if self.body_field is not None:
                await _read(asked)
            return await handler(asked)

        return handle


class _JsonRequest(Request):
    """A request whose JSON can be written as JSON again: without NaN and halves of characters."""

    async def json(self) -> Any:
        try:
            return _parsed(await self.body())
        except InputError as error:
            # FastAPI has a sentence of its own for any other exception.
            raise HTTPException(400, str(error)) from error


async def _read(request: Request) -> None:
    """Read a body, which the request keeps.

    Raises:
        HTTPException: it is not said to be JSON.
        GoneError: the client left before all of it came.
        OverdueError: it did not come in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(
            415, "the body must be JSON: send the header `Content-Type: application/json`"
        )
    seconds = request.app.state.settings.timeout
    try:
        await asyncio.wait_for(request.body(), seconds)
    except ClientDisconnect:
        raise GoneError from None
    except TimeoutError:
        raise OverdueError(seconds) from None


def _parsed(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the body is not UTF-8; encode it so") from error
    value = parse_json(text, "the body", "send a JSON object")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the body has half of a surrogate pair; leave it out") from error
    except RecursionError as error:
        raise InputError(
            "the body is not valid JSON: it is too deep; send a flatter one"
        ) from error
    except ValueError as error:
        raise InputError("the body has NaN or an infinite number, which JSON has not") from error
    return value
