"""`RequestSpans`: a span of OpenTelemetry for each request, in the trace of the client if it sends one."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that monitoring asks for all the time."""


class RequestSpans:
    """Wraps an application.

    A span has the route and not the path as its name, so that there are few names. It has no query, header or body,
    which can contain secrets and prompts.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry import trace

        self._app, self._tracer = app, trace.get_tracer("loraline.serving")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request within a span."""
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._tracer.start_as_current_span(
            scope["method"], extract(headers), SpanKind.SERVER, {"http.request.method": scope["method"]}
        ) as span:

            async def send_noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attributes(_attributes(scope, message["status"]))
                    span.update_name(f"{scope['method']} {_route(scope)}".rstrip())
                    if message["status"] >= 500:
                        from opentelemetry.trace import Status, StatusCode

                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            await self._app(scope, receive, send_noted)


def _attributes(scope: Scope, status: int) -> dict[str, Any]:
    tenant, route = scope.get("state", {}).get("tenant"), _route(scope)
    return {
        "http.response.status_code": status,
        **({"http.route": route} if route else {}),
        **({"loraline.tenant": tenant} if tenant else {}),
    }


def _route(scope: Scope) -> str:
    """Returns the template of the path; empty if no route answered, as for what the guard refuses."""
    return str(getattr(scope.get("route"), "path", ""))
