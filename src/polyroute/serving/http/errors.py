"""Errors as OpenAI's clients read them: one sentence, a type, and often a code."""

import json
import logging
import traceback
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from polyroute.errors import InputError
from polyroute.serving.requests import BusyError, ServingError, StoppingError

__all__ = [
    "GONE",
    "OVERDUE",
    "GoneError",
    "OverdueError",
    "Refusal",
    "UnknownModelError",
    "add_handlers",
    "log",
    "refusal_of",
    "shown",
]

log = logging.getLogger("polyroute.serve")
"""Each record is one line of JSON."""
GONE = 499
"""The status of a request whose client left; nobody receives it, but logs and metrics tell it."""
OVERDUE = 504
SENTENCES = {
    404: "there is nothing at this address; /openapi.json lists what there is",
    405: "this address does not take this method; /openapi.json lists what it takes",
}


class UnknownModelError(Exception):
    """No model of this name exists, or the key that was used may not see it.

    Args:
        name: as the client wrote it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {shown(name)} does not exist; GET /v1/models lists all")


class OverdueError(Exception):
    """A request took too long.

    Args:
        seconds: what it may take.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took longer than the {seconds:g} seconds that it may take")


class GoneError(Exception):
    """The client left before it had an answer."""


@dataclass(frozen=True)
class Refusal:
    """What a client gets instead of an answer."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = "rate_limit_error" if self.status == 429 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": "invalid_request_error" if self.status < 429 else kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The refusal as an answer of its own."""
        return JSONResponse(self.document, self.status, self.headers)


def shown(name: str) -> str:
    """A client's name for something, in quotes and not too long."""
    return repr(name) if len(name) <= 100 else f"{name[:100]!r}..."


def refusal_of(error: Exception, request_id: str) -> Refusal:
    """What a client gets for an error. One that nobody foresaw is logged, and not told.

    Args:
        error: the error.
        request_id: what the log tells the request by.
    """
    match error:
        case RequestValidationError():
            return _invalid(error)
        case HTTPException(status_code=status, headers=headers):
            message = SENTENCES.get(status, str(error.detail))
            return Refusal(status, message, headers=dict(headers or {}))
        case UnknownModelError():
            return Refusal(404, str(error), "model_not_found", "model")
        case InputError():
            return Refusal(400, str(error))
        case BusyError():
            message = str(error) or "too many requests wait; ask again in a second"
            return Refusal(429, message, "busy", headers={"Retry-After": "1"})
        case StoppingError():
            return Refusal(503, str(error) or "the server is shutting down", "stopping")
        case OverdueError():
            return Refusal(OVERDUE, str(error), "timeout")
        case GoneError():
            return Refusal(GONE, "the client left")
        case ServingError():
            return Refusal(500, str(error), "model_failed")
    trace = "".join(traceback.format_exception(error))
    log.error(json.dumps({"request_id": request_id, "error": type(error).__name__, "trace": trace}))
    return Refusal(
        500,
        f"the server failed on this request; its log has the reason under request id {request_id}",
        "server_failed",
    )


def add_handlers(app: FastAPI) -> None:
    """Make an app answer with such errors, whatever is raised in its routes."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return refusal_of(error, request.state.seen.request_id).response()

    for kind in (
        RequestValidationError, HTTPException, UnknownModelError, InputError, BusyError,
        StoppingError, OverdueError, GoneError, ServingError,
    ):  # fmt: skip
        app.add_exception_handler(kind, refuse)


def _invalid(error: RequestValidationError) -> Refusal:
    """The first of what is wrong with a body or a query, as one sentence."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    param = ".".join(place) or None
    where = shown(param) if param else "the body"
    match first["type"]:
        case "extra_forbidden":
            message = f"the field {where} is not known here; leave it out"
        case "missing":
            message = f"{where} is missing" + ("; send a JSON object" if param is None else "")
        case "value_error":
            message = str(first["ctx"]["error"])
        case _:
            reason = first["msg"]
            message = f"{where} cannot be used: {reason[:1].lower()}{reason[1:]}"
    return Refusal(400, message, param=param)
