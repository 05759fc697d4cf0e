"""GET /v1/models: a model for each task, beside the average and the base model."""

import asyncio
from bisect import bisect_right
from typing import Annotated, Any

from fastapi import APIRouter, Query

from polyroute.serving.http.calls import Call, Called
from polyroute.serving.requests import SHARED

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def models(
    call: Called,
    limit: Annotated[int, Query(ge=1, le=100_000)] = 1000,
    after: str | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """The models that the client may use and whose names begin with `prefix`.

    Of many these are the first ones, or those that follow `after` in the list.
    """
    # In a thread, since 100,000 names take so long to read that running streams would falter.
    own = await asyncio.to_thread(call.service.task_names, call.names.prefix + prefix)
    tasks = sorted(call.names.outer(name) for name in own)
    shared = list(SHARED)
    if after in SHARED:
        shared = shared[SHARED.index(after) + 1 :]
    elif after is not None:
        # By the alphabet, so that the task that a page ended with may have been removed since.
        shared, tasks = [], tasks[bisect_right(tasks, after) :]
    shared = [name for name in shared if name.startswith(prefix)]
    names = (shared + tasks)[: limit + 1]
    data = [_model(call, name) for name in names[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(names) > limit,
    }


@router.get("/v1/models/{name:path}")
async def model(call: Called, name: str) -> dict[str, Any]:
    """One model."""
    call.known(name)
    return _model(call, name)


def _model(call: Call, name: str) -> dict[str, Any]:
    created = call.request.app.state.created
    return {"id": name, "object": "model", "created": created, "owned_by": call.service.name}
