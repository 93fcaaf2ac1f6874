"""The page on which a browser signs in to the studio with a token."""

from __future__ import annotations

from html import escape
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from flows.web.callers import COOKIE, Sessions, caller_of
from flows.web.tokens import Tokens

login_routes = APIRouter(include_in_schema=False)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - Loraline</title>
<style>
body {{ font: 1rem system-ui, sans-serif; max-width: 24rem; margin: 10vh auto; padding: 0 1rem; }}
label, input, button {{ display: block; width: 100%; box-sizing: border-box; font: inherit; }}
input, button {{ margin-top: .5rem; padding: .6rem; }}
.error {{ color: #b00020; }}
</style>
<h1>{title}</h1>
<p class="error" role="alert">{problem}</p>
<form method="post">{fields}</form>
</html>
"""
_FORM = """
<label>Token <input name="token" type="password" autocomplete="current-password" required autofocus></label>
<button>Sign in</button>
"""
_SIGN_OUT = '<input name="form" type="hidden" value="{form}"><button>Sign out {user}</button>'


def _page(title: str, fields: str, problem: str = "", status: int = 200) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(title=title, fields=fields, problem=escape(problem)), status)


@login_routes.get("/")
async def show_start(request: Request) -> Response:
    """Show the studio, or the OpenAPI document of a server without it."""
    return RedirectResponse("/studio" if request.app.state.settings.studio else "/openapi.json", 303)


@login_routes.get("/login")
async def show_login() -> HTMLResponse:
    """Show the form."""
    return _page("Sign in", _FORM)


@login_routes.post("/login")
async def sign_in(request: Request) -> Response:
    """Open a session, and send its cookie."""
    tokens: Tokens | None = request.app.state.tokens
    sessions: Sessions | None = request.app.state.sessions
    if tokens is None or sessions is None:
        return RedirectResponse("/studio", 303)
    entry = tokens.find((await _field(request, "token")).strip())
    if entry is None:
        return _page("Sign in", _FORM, "This token is not valid.", 401)
    response = RedirectResponse("/studio", 303)
    response.set_cookie(
        COOKIE,
        sessions.open(entry),
        httponly=True,
        samesite="strict",
        secure=request.app.state.settings.is_secure,
        path="/",
    )
    return response


@login_routes.get("/logout")
async def show_logout(request: Request) -> HTMLResponse:
    """Show the form, which is bound to the session."""
    caller = caller_of(request)
    sessions: Sessions | None = request.app.state.sessions
    if sessions is None or not caller.session:
        return _page("Sign out", "", "You are not signed in.")
    user = escape(str(caller.actor or ""))
    return _page("Sign out", _SIGN_OUT.format(form=sessions.form_token(caller.session), user=user))


@login_routes.post("/logout")
async def sign_out(request: Request) -> Response:
    """Close the session."""
    caller = caller_of(request)
    sessions: Sessions | None = request.app.state.sessions
    if sessions is not None and caller.session:
        if not sessions.is_form_token(caller.session, await _field(request, "form")):
            return _page("Sign out", "", "This form is of another session.", 403)
        sessions.close(caller.session)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE, path="/")
    return response


async def _field(request: Request, name: str) -> str:
    """Returns a field of a form, or an empty text."""
    body = (await request.body())[:10_000].decode(errors="replace")
    return parse_qs(body, max_num_fields=10).get(name, [""])[0]
