"""What is served: /metrics and /healthz. One application for each door, so that a door's guard can't be got around."""

import hmac
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Bearer:
    """Lets nobody in without the token, whatever is asked for."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        """Guard `app`."""
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what carries the token; compared in constant time."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope.get("headers", []) if name == b"authorization"]
        if len(given) == 1 and hmac.compare_digest(given[0], self._expected):
            await self._app(scope, receive, send)
            return
        refused = PlainTextResponse(
            "a token is needed: Authorization: Bearer TOKEN (web.token)\n",
            status_code=401,
            headers={"WWW-Authenticate": 'Bearer realm="ckptd"'},
        )
        await refused(scope, receive, send)


def site(metrics: Callable[[], bytes], health: Callable[[], dict[str, Any]], token: str = "") -> Starlette:
    """Make the application; with a token, one that asks for it."""

    async def serve_metrics(_request: Request) -> Response:  # noqa: ASYNC124 - a plain one would run in a thread
        return Response(metrics(), headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    async def serve_health(_request: Request) -> Response:  # noqa: ASYNC124 - likewise
        found = health()
        return JSONResponse(found, 200 if found["well"] else 503, headers={"Cache-Control": "no-store"})

    routes = [Route("/metrics", serve_metrics, methods=["GET"]), Route("/healthz", serve_health, methods=["GET"])]
    return Starlette(routes=routes, middleware=[Middleware(Bearer, token=token)] if token else [])
