"""POST /v1/embeddings: texts as vectors."""

import base64
import struct
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from polyroute.serving.http.bodies import JsonRoute
from polyroute.serving.http.calls import Called
from polyroute.serving.http.schema import EmbeddingAsked

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings")
async def embed(call: Called, asked: EmbeddingAsked) -> Response:
    """Embed one or more texts."""
    task = call.known(asked.model)
    with call.about(asked.model):
        vectors, tokens = await call.while_there(call.service.embed(task, asked.input))
    call.seen.prompt_tokens = tokens
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, asked.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})


def _written(vector: list[float], form: str) -> Any:
    """A vector as numbers, or as the bytes of fp32, which OpenAI's client asks for."""
    if form == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
