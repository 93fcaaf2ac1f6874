"""Establishes as whom the registry tabs of the studio act, and shows what they say: errors with all reasons, notes.

Each event function of a tab can be called without its button, so each asks for the actor itself and passes it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, cast

from lora_engine.errors import WordedError
from registry.errors import IdentityError, Refused
from registry.identity import Actor


def find_actor(request: Any) -> Actor | None:
    """Returns the user of a request; None is the user of this process, on a server without tokens.

    The application establishes the caller of every request, and puts it into the scope as `state["caller"]`.

    Args:
        request: `gradio.Request`, or a request of Starlette.

    Raises:
        IdentityError: The application established nobody: the request did not pass its checks.
    """
    inner = getattr(request, "request", None) or request
    scope = getattr(inner, "scope", None) or {}
    caller = (scope.get("state") or {}).get("caller")
    if caller is None:
        raise IdentityError("no user is established", where="studio", remedy="sign in, and load the page again")
    return cast("Actor | None", caller.actor)


def tenant_of(request: Any) -> str:
    """Returns for whom images of a request are drawn."""
    inner = getattr(request, "request", None) or request
    return str(inner.scope["state"]["caller"].tenant)


def render_error(error: WordedError) -> str:
    """Returns an error as an alert, with every reason of a refusal on a line of its own."""
    if not isinstance(error, Refused):
        return f'<div class="reg-error" role="alert">{escape(str(error))}</div>'
    where = f"{error.where}: " if error.where else ""
    problem = error.problem.partition(": (1)")[0]
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in error.reasons)
    fix = f'<div class="fix">Fix: {escape(error.remedy)}.</div>' if error.remedy else ""
    return f'<div class="reg-error" role="alert">{escape(where + problem)}<ul>{reasons}</ul>{fix}</div>'


def note(text: str) -> str:
    """Returns a short message; an empty one is hidden."""
    return f'<p class="reg-note" role="status">{escape(text)}</p>' if text else ""


def done(text: str) -> str:
    """Returns the message of a change that was made."""
    return f'<div class="reg-done" role="status">{escape(text)}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, label: str) -> str:
    """Returns a table that scrolls on narrow screens; cells are HTML, which the caller escapes."""
    listed = list(rows)
    if not listed:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in listed)
    return (
        f'<div class="reg-scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
