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

STYLE = """
<style>
.reg-error { border-left: 4px solid #b3261e; padding: .5rem .75rem; margin: .25rem 0; overflow-wrap: anywhere;
  background: color-mix(in srgb, #b3261e 9%, transparent); border-radius: 6px; }
.reg-error ul { margin: .25rem 0 0; padding-left: 1.2rem; } .reg-error .fix { margin-top: .35rem; opacity: .85; }
.reg-note { margin: .25rem 0; color: var(--body-text-color-subdued); }
.reg-done { border-left: 4px solid #1a7f4b; padding: .5rem .75rem; margin: .25rem 0; border-radius: 6px;
  background: color-mix(in srgb, #1a7f4b 10%, transparent); overflow-wrap: anywhere; }
.reg-scroll { overflow-x: auto; }
.reg-scroll table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
.reg-scroll th { text-align: left; font-weight: 600; color: var(--body-text-color-subdued); white-space: nowrap; }
.reg-scroll th, .reg-scroll td { padding: .4rem .7rem .4rem 0; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; min-width: 4rem; }
.reg-tag { display: inline-block; border: 1px solid currentColor; border-radius: 999px; padding: 0 .5rem;
  font-size: .8rem; white-space: nowrap; } .reg-bad { color: #b3261e; } .reg-good { color: #1a7f4b; }
.dark .reg-bad { color: #ff9a90; } .dark .reg-good { color: #7dd3a5; }
</style>
"""
"""Styles of the registry tabs, which the page includes once."""


def actor_of(request: Any) -> Actor | None:
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


def explain(error: WordedError) -> str:
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
