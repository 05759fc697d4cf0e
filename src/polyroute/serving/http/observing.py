"""What the server tells of its work: request ids, a line of log for each request, and metrics."""

import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Counter, GaugeMetricFamily, Histogram
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyroute.serving.http.errors import GONE, log, refusal_of
from polyroute.serving.http.service import Service

__all__ = ["HEALTH", "Metrics", "Observing", "Seen", "router"]

HEALTH = "/health"
SANE_ID = re.compile(r"[\x21-\x7e]{1,64}")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds of the buckets of both histograms: from one token on a GPU to a long answer on a CPU."""
router = APIRouter()


@dataclass
class Seen:
    """What is known of one request; whoever answers it adds to it."""

    request_id: str
    began: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    """Seconds until then."""
    status: int | None = None
    """Of an error behind the first part of a stream, whose own status was sent before."""

    @property
    def seconds(self) -> float:
        """How long the request has taken."""
        return time.perf_counter() - self.began

    def add_tokens(self, count: int) -> None:
        """Count tokens of an answer."""
        if count and self.first_token is None:
            self.first_token = self.seconds
        self.completion_tokens += count


class Metrics:
    """What Prometheus reads. No label has names of tasks, so their number stays small.

    Args:
        service: whose load it reads too.
    """

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "polyroute_requests", "Requests answered.", ["route", "status"], registry=own
        )
        self.prompt_tokens = Counter("polyroute_prompt_tokens", "Tokens of prompts.", registry=own)
        self.completion_tokens = Counter(
            "polyroute_completion_tokens", "Tokens of answers.", registry=own
        )
        self.seconds = Histogram(
            "polyroute_request_seconds", "Time until the end of an answer.", ["route"],
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self.first_token = Histogram(
            "polyroute_first_token_seconds", "Time until the first token of an answer.",
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self.registry.register(_Load(service))

    def add(self, route: str, status: int, seen: Seen) -> None:
        """Count a request that has been answered."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seen.seconds)
        self.prompt_tokens.inc(seen.prompt_tokens)
        self.completion_tokens.inc(seen.completion_tokens)
        if seen.first_token is not None:
            self.first_token.observe(seen.first_token)


class _Load(Collector):
    """The gauges of a service, read when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self.service.load().items():
            words = name.replace("_", " ").capitalize()
            yield GaugeMetricFamily(f"polyroute_{name}", f"{words}.", value=value)


class Observing:
    """Numbers, times, counts and logs requests, and answers for errors that nobody foresaw.

    Args:
        app: what is observed.
        metrics: what counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and tell of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        seen = Seen(given if SANE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["seen"] = seen
        status = GONE  # unless an answer begins

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = seen.request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, named)
        except Exception as error:
            refusal = refusal_of(error, seen.request_id)
            seen.status = refusal.status
            if status == GONE:
                await refusal.response()(scope, receive, named)
        finally:
            self._tell(scope, seen.status or status, seen)

    def _tell(self, scope: Scope, status: int, seen: Seen) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self.metrics.add(route, status, seen)
        line = {
            "request_id": seen.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seen.seconds, 6),
            "prompt_tokens": seen.prompt_tokens,
            "completion_tokens": seen.completion_tokens,
        }
        log.info(json.dumps(line))


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    found: Metrics = request.app.state.metrics
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/load")
async def load(request: Request) -> dict[str, float]:
    """How busy the server is."""
    service: Service = request.app.state.service
    return dict(service.load())


@router.get(HEALTH)
async def health(request: Request) -> Response:
    """Whether requests are being answered, and which there can be."""
    service: Service = request.app.state.service
    is_healthy = service.is_healthy()
    told = {
        "status": "ok" if is_healthy else "failing",
        "name": service.name,
        "writes": service.writes,
        "has_chat": service.has_chat,
        "has_rows": service.has_rows,
        "can_learn": service.can_learn,
        "max_length": service.max_length,
    }
    return JSONResponse(told, 200 if is_healthy else 503)
