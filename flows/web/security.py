"""`Guard`: what every request must pass first, also those of pages that are mounted on the application.

It checks Host against DNS rebinding and Origin against cross-site requests, establishes the caller, and bounds the
body, its time and the number of requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.web.callers import LOCAL, Caller, Sessions, read_cookie, read_token
from flows.web.errors import describe_failure
from flows.web.limits import RequestLimit
from flows.web.tokens import Tokens
from registry.policy.actors import acting_as
from tasks.serving.job import Failure

LOGIN, STUDIO = "/login", "/studio"
_OPEN = frozenset({"/", "/healthz", "/readyz", LOGIN})
"""Paths that need no token."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_logger = logging.getLogger("flows.web.access")
_COMMON = "frame-ancestors 'none'; base-uri 'none'; object-src 'none'; form-action 'self'"
_PAGE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    f"connect-src 'self'; {_COMMON}"
)
"""Gradio's page has scripts and styles of its own in its HTML."""
_PLAIN = f"default-src 'none'; style-src 'unsafe-inline'; {_COMMON}"
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),  # `no-referrer` makes browsers send the Origin `null` with own forms
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True)
class GuardSettings:
    """Bounds of requests.

    Attributes:
        hosts: Values of the header `Host` that are answered, without port.
        max_body: Bytes of a body.
        body_seconds: Seconds in which a body must arrive.
        requests_per_minute: Requests of one tenant; 0 does not bound them.
    """

    hosts: tuple[str, ...]
    max_body: int
    body_seconds: float
    requests_per_minute: int


class _Stop(Exception):
    """Ends a request with an answer."""

    def __init__(
        self,
        status: int,
        problem: str,
        headers: Mapping[str, str] | None = None,
        *,
        allowed: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(problem)
        kinds = {
            400: "InvalidHost",
            401: "Unauthorized",
            403: "Forbidden",
            408: "Timeout",
            413: "TooLarge",
            500: "InternalError",
        }
        self.status, self.headers = status, headers
        self.failure = Failure(kinds.get(status, "TooManyRequests"), problem, allowed=allowed, remedy=remedy)


class Guard:
    """The outermost part of the application.

    Args:
        app: The application.
        settings: The bounds.
        tokens: The tokens; None lets everyone in who can connect, as the process's user.
        sessions: The signed-in browsers.
    """

    def __init__(
        self, app: ASGIApp, settings: GuardSettings, tokens: Tokens | None = None, sessions: Sessions | None = None
    ) -> None:
        self._app, self._settings, self._tokens, self._sessions = app, settings, tokens, sessions
        self._limit = RequestLimit(settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        path: str = scope["path"]

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                policy = (_PAGE if path.startswith(STUDIO) else _PLAIN).encode()
                added = [pair for pair in (*_HEADERS, (b"content-security-policy", policy)) if pair[0] not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_host(headers)
            self._check_origin(scope, headers)
            caller = self._find_caller(path, headers, scope)
            if caller is None:
                await RedirectResponse(LOGIN, 303)(scope, receive, send_guarded)
                return
            scope.setdefault("state", {}).update(caller=caller, tenant=caller.tenant)
            if not path.startswith(STUDIO) and path not in _OPEN:
                self._limit_requests(caller)
            if scope["type"] == "http":
                receive = await self._read_body(headers, receive)
            with acting_as(caller.actor):
                await self._app(scope, receive, send_guarded)
        except _Stop as stop:
            await self._refuse(stop, scope, receive, send_guarded)
        except Exception:  # a bug of a route: its text could show paths, and goes to the log alone
            _logger.exception("%s failed", path[:200])
            if not status:
                failed = _Stop(500, "the server failed; its log has the cause")
                await self._refuse(failed, scope, receive, send_guarded)
        finally:
            seconds = time.monotonic() - started
            _logger.info("%s %s %d %.3f s", scope.get("method", "WEBSOCKET"), path[:200], status, seconds)

    def _check_host(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if _name_of(host) not in self._settings.hosts:
            allowed = ", ".join(self._settings.hosts)
            raise _Stop(
                400, f"the header Host is {host[:80]!r}", allowed=allowed, remedy="use --public-host to add one"
            )

    def _check_origin(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Refuses requests that a page of another site makes, with any content type and any method."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        is_foreign = origin is not None and origin.partition("://")[2].lower() != headers["host"].lower()
        is_navigation = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") in {"GET", "HEAD"}
        if is_foreign or (site in {"cross-site", "same-site"} and not is_navigation):
            raise _Stop(403, f"a page of {origin or 'another site'} sent this", remedy="open the page of this server")

    def _find_caller(self, path: str, headers: Mapping[str, str], scope: Scope) -> Caller | None:
        """Returns the caller; None for a browser that must sign in."""
        if self._tokens is None:
            return Caller(LOCAL, None)
        entry = self._tokens.find(read_token(headers.get("authorization", "")))
        if entry is not None:
            return Caller(entry.tenant, entry.actor)
        is_page = path.startswith(STUDIO) or path == "/logout"
        session = read_cookie(headers.get("cookie", "")) if is_page else ""
        entry = self._sessions.find(session) if self._sessions is not None and session else None
        if entry is not None:
            if scope.get("method") not in _SAFE and "origin" not in headers:
                raise _Stop(403, "a signed-in browser sent no Origin", remedy="send a token instead of a cookie")
            return Caller(entry.tenant, entry.actor, session)
        if path in _OPEN:
            return Caller("", None)
        if is_page and scope.get("method") == "GET" and "text/html" in headers.get("accept", ""):
            return None
        challenge = {"WWW-Authenticate": 'Bearer realm="loraline", Basic realm="loraline"'}
        raise _Stop(401, "no valid token", challenge, remedy="send the header `Authorization: Bearer TOKEN`")

    def _limit_requests(self, caller: Caller) -> None:
        seconds = self._limit.admit(caller.tenant)
        if seconds > 0:
            raise _Stop(
                429,
                f"more than {self._settings.requests_per_minute} requests a minute",
                {"Retry-After": str(seconds)},
                remedy="send the request again later",
            )

    async def _read_body(self, headers: Mapping[str, str], receive: Receive) -> Receive:
        """Reads the body within its bounds, and returns a function that hands it on."""
        limit = self._settings.max_body
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:19]) > limit:
            raise _Stop(413, f"the body has {length[:20]} bytes", allowed=f"at most {limit:,} bytes")
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _replay(message, receive)
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise _Stop(413, f"the body has over {limit:,} bytes", allowed=f"at most {limit:,} bytes")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            problem = f"the body did not arrive within {self._settings.body_seconds:g} seconds"
            raise _Stop(408, problem, {"Connection": "close"}) from None
        return _replay({"type": "http.request", "body": b"".join(chunks), "more_body": False}, receive)

    async def _refuse(self, stop: _Stop, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        body: dict[str, Any] = {"error": describe_failure(stop.failure).model_dump()}
        if scope["path"].startswith("/sdapi/"):  # clients of A1111 show `detail` alone
            body["detail"] = body["error"]["message"]
        response = JSONResponse(body, stop.status, dict(stop.headers or {}))
        await response(scope, receive, send)


def _replay(first: Message, receive: Receive) -> Receive:
    pending = [first]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


def _name_of(host: str) -> str:
    """Returns the name in a `Host` header, without its port; brackets of IPv6 stay."""
    name = host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.lower()
