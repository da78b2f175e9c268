"""The HTTP application: routes, errors in OpenAI's shape, and the service's life around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server import __version__
from server.api import chat, completions, contexts, models
from server.api.gate import Gate, error_headers
from server.api.service import Service, TheService
from server.api.stream import JSON
from server.errors import EngineDeadError, NotFoundError, RequestError, SteadystateError


def create_app(service: Service) -> FastAPI:
    """An application that starts the service with itself and ends it with itself."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="Steadystate",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
    )
    app.state.service = service
    for router in (chat.router, completions.router, contexts.router, models.router):
        app.include_router(router)
    app.add_api_route("/health", health, methods=["GET", "HEAD"])
    app.add_api_route("/version", version, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_exception_handler(SteadystateError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_middleware(Gate, service=service)
    return app


async def health(service: TheService) -> Response:
    """200 when requests can be served; else 503 and why not."""
    try:
        service.check()
    except EngineDeadError as error:
        body = {"status": service.condition, **error.body()}
        return JSON(body, status_code=503, headers=error_headers(error))
    return JSON({"status": "ok"})


async def version() -> Response:
    """The server's version."""
    return JSON({"version": __version__})


async def metrics(service: TheService) -> Response:
    """Prometheus' text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def on_error(request: Request, error: Exception) -> Response:
    """Our own exceptions, as their bodies say."""
    assert isinstance(error, SteadystateError)
    request.state.record.error = error.message
    headers = error_headers(error)
    if error.status == 413:
        headers["connection"] = "close"  # the rest of the body will not be read
    return JSON(error.body(), status_code=error.status, headers=headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """The framework's: no such route, no such method."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path[:200]}"
    ours: SteadystateError
    if error.status_code == 404:
        ours = NotFoundError(f"no such route: {route}", code="not_found")
    elif error.status_code == 405:
        ours = RequestError(f"method not allowed: {route}", code="method_not_allowed")
    else:
        ours = RequestError(f"{error.detail}")
    request.state.record.error = ours.message
    return JSON(ours.body(), status_code=error.status_code, headers=error.headers)
