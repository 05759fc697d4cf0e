"""The whole HTTP interface as one app."""

import time
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from polyroute import __version__
from polyroute.serving.http import (
    chat,
    completions,
    embeddings,
    models,
    observing,
    page,
    tasks,
)
from polyroute.serving.http.access import Access
from polyroute.serving.http.bodies import BodyLimit
from polyroute.serving.http.errors import add_handlers
from polyroute.serving.http.service import Service
from polyroute.serving.http.settings import HttpSettings

__all__ = ["make_app"]


def make_app(service: Service, settings: HttpSettings) -> FastAPI:
    """The HTTP interface of a service.

    Args:
        service: the models.
        settings: how it treats those who ask.
    """
    app = FastAPI(
        title="polyroute",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # names of tasks may end with one
    )
    app.state.service = service
    app.state.settings = settings
    app.state.metrics = observing.Metrics(service)
    app.state.created = int(time.time())
    app.state.tokenizing = ThreadPoolExecutor(1, "tokenizing")
    for each in (completions, chat, embeddings, models, tasks, observing, page):
        app.include_router(each.router, responses={"4XX": {"description": "What is wrong"}})
    add_handlers(app)
    # The last one added is asked first.
    app.add_middleware(BodyLimit, most=settings.max_body)
    # The page asks for a key, and whoever watches the server needs none to see that it lives.
    app.add_middleware(
        Access, api_keys=settings.api_keys, open_paths={*page.FILES, observing.HEALTH}
    )
    if settings.allowed_hosts:
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts), www_redirect=False
        )
    app.add_middleware(observing.Observing, metrics=app.state.metrics)
    return app
