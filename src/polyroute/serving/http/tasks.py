"""/v1/tasks: learning tasks from examples, and their rows."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from polyroute.errors import InputError
from polyroute.serving.http.bodies import JsonRoute
from polyroute.serving.http.calls import Call, Called
from polyroute.serving.http.errors import UnknownModelError
from polyroute.serving.http.schema import RowAsked, TaskAsked
from polyroute.serving.requests import SHARED

__all__ = ["router"]

UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
"""What the name of a file for any system, and a header, can do without."""
router = APIRouter(route_class=JsonRoute)
# A route with more behind the name comes before the one without, whose names may have slashes.


@router.post("/v1/tasks", status_code=202)
async def learn(call: Called, asked: TaskAsked) -> Response:
    """Start to learn a task from examples."""
    inner = call.own(asked.name)
    given = asked.model_extra or {}
    settings = {name: value for name, value in given.items() if value is not None}
    with call.about(asked.name, exists=False):
        job = await call.in_time(call.service.learn(inner, asked.examples, settings))
    return JSONResponse(_told(call, asked.name, job), 202)


@router.post("/v1/tasks/{name:path}/export")
async def export(call: Called, name: str) -> Response:
    """A zip file of a task, as PEFT and servers with adapters read it."""
    inner = call.known(name)
    with call.about(name):
        content = await call.while_there(call.service.export(inner))
    file = UNSAFE.sub("_", name)[:100]
    headers = {"Content-Disposition": f'attachment; filename="{file}.zip"'}
    return Response(content, media_type="application/zip", headers=headers)


@router.get("/v1/tasks/{name:path}/row")
async def row(call: Called, name: str) -> dict[str, Any]:
    """The row of a task, the weights that it gives, and the routers that these belong to."""
    inner = _with_row(call, name)
    with call.about(name):
        weights, routers = call.service.weights(inner)
        row = call.service.row(inner)
    return {"name": name, "row": row, "weights": weights, "routers": list(routers)}


@router.get("/v1/tasks/{name:path}/nearest")
async def nearest(
    call: Called, name: str, k: Annotated[int, Query(ge=1, le=1000)] = 5
) -> dict[str, Any]:
    """The client's tasks whose routes are most similar to that of one."""
    inner, prefix = _with_row(call, name), call.names.prefix
    with call.about(name):
        ranked = await call.while_there(call.service.nearest(inner, k, prefix))
    own = [(call.names.outer(other), likeness) for other, likeness in ranked]
    return {"name": name, "nearest": [{"name": other, "similarity": like} for other, like in own]}


@router.get("/v1/tasks/{name:path}")
async def task(call: Called, name: str) -> dict[str, Any]:
    """Whether a task answers, and how its learning goes if it was learned here."""
    inner = call.names.inner(name)
    job, answers = call.service.job(inner), call.service.has_task(inner)
    if job is None and not answers:
        raise UnknownModelError(name)
    told = None if job is None else _told(call, name, job)
    return {"name": name, "answers": answers, "job": told}


@router.put("/v1/tasks/{name:path}")
async def put(call: Called, name: str, asked: RowAsked) -> Response:
    """Give a task a row."""
    inner = call.own(name)
    with call.about(name, exists=False):
        is_new = await call.in_time(call.service.put_row(inner, asked.row))
    return JSONResponse({"name": name, "new": is_new}, 201 if is_new else 200)


@router.delete("/v1/tasks/{name:path}")
async def delete(call: Called, name: str) -> dict[str, Any]:
    """Remove a task."""
    inner = call.own(name)
    call.known(name)
    with call.about(name):
        await call.in_time(call.service.delete(inner))
    return {"id": name, "object": "task", "deleted": True}


def _with_row(call: Call, name: str) -> str:
    """The service's name for a task that exists."""
    if name in SHARED:
        raise InputError(f"{name!r} has no row; name a task")
    return call.known(name)


def _told(call: Call, name: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """A job with the client's name for its task."""
    error = job.get("error")
    told = {**job, "name": name}
    if isinstance(error, str):
        told["error"] = call.names.told(error, name)
    return told
