"""The tab Releases: which version has which alias since when, and changes in two steps: review, then confirm."""

from __future__ import annotations

from contextlib import closing
from html import escape
from typing import TYPE_CHECKING, Any, cast, get_args

import gradio

from flows.web.callers import caller_of
from flows.web.studio.page_messages import show_done, show_error, show_note, show_refusal, show_table
from flows.web.studio.page_style import QUIET
from flows.web.studio.releases_waiting import add_waiting
from lora_engine.errors import WordedError
from registry.errors import PromotionError
from registry.versions.versions import Versions
from tasks.operations.releases import (
    ReleaseAction,
    ReleaseReview,
    carry_out,
    read_release_events,
    read_releases,
    review_release,
)
from tasks.operations.vote_results import describe_summary, results_of

if TYPE_CHECKING:
    from flows.web.studio.context import Studio
    from registry.entities import AdapterVersion, Event
    from registry.policy.conditions import AliasState

_LABELS: list[tuple[str, str]] = [
    ("Promote", "promote"),
    ("Roll back", "rollback"),
    ("Endorse", "endorse"),
    ("Withdraw version", "withdraw"),
    ("Remove alias", "unalias"),
]
_ALIASES = ["production", "staging"]


def add_releases(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`."""
    tab = _Releases(studio)
    with gradio.Row():
        name = gradio.Dropdown([], label="Adapter", interactive=True, scale=4)
        refresh = gradio.Button("Refresh", scale=0, min_width=110, elem_classes="studio-refresh")
    aliases = gradio.HTML(apply_default_css=False, padding=False)
    with gradio.Group():
        with gradio.Row():
            action = gradio.Radio(_LABELS, value="promote", label="Action")
        with gradio.Row():
            version = gradio.Dropdown([], label="Version to change", interactive=True)
            alias = gradio.Dropdown(_ALIASES, value="production", label="Alias", allow_custom_value=True)
        reason = gradio.Textbox(label="Reason, stored in the log", max_length=2_000)
    with gradio.Row():
        review = gradio.Button("Review", variant="primary")
        confirm = gradio.Button("Confirm", variant="stop", interactive=False)
    reviewed = gradio.State(None)
    message = gradio.HTML(apply_default_css=False, padding=False, min_height=40)
    with gradio.Accordion("Versions", open=False):
        versions = gradio.HTML(apply_default_css=False, padding=False)
    with gradio.Accordion("History", open=True):
        history = gradio.HTML(apply_default_css=False, padding=False)
    shown: list[Any] = [name, aliases, version, versions, history]
    gradio.on([refresh.click, studio.page.load, name.input], tab.show, name, shown, **QUIET)
    inputs = [name, action, version, alias, reason]
    review.click(tab.review, inputs, [reviewed, message, confirm], **QUIET)
    # What changes after a review is not what was reviewed.
    gradio.on(
        [action.input, version.input, alias.input, name.input],
        tab.forget,
        None,
        [reviewed, message, confirm],
        **QUIET,
    )
    event = confirm.click(tab.confirm, [reviewed, reason], [reviewed, message, confirm], **QUIET)
    event.then(tab.show, name, shown, **QUIET)
    add_waiting(studio)


class _Releases:
    """The events of the tab.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._home = studio.service.home

    def show(self, name: str | None) -> tuple[Any, str, Any, str, str]:
        """Returns the adapters, the aliases of all, and versions and history of one."""
        try:
            states = read_releases(self._home)
            with closing(Versions(self._home)) as versions:
                names = list(dict.fromkeys(version.name for version in versions.list()))
                chosen = name if name in names else (names[0] if names else None)
                own = list(versions.list(chosen)) if chosen else []
                votes = {version.ref: results_of(versions, version).against for version in own}
            moves = read_release_events(self._home, chosen) if chosen else []
        except WordedError as error:
            return gradio.skip(), show_error(error), gradio.skip(), "", ""
        active = [(_label(version), str(version.version)) for version in reversed(own) if version.state == "ACTIVE"]
        summaries = {
            ref: "<br>".join(
                f"against {escape(other)}: {escape(describe_summary(one))}" for other, one in found.items()
            )
            for ref, found in votes.items()
        }
        return (
            gradio.update(choices=names, value=chosen),
            _aliases(states) or show_note("No alias yet. Promote a version below."),
            gradio.update(choices=active, value=active[0][1] if active else None),
            _versions(own, summaries),
            _history(moves),
        )

    def review(
        self,
        name: str | None,
        action: str,
        version: str | None,
        alias: str | None,
        reason: str,
        request: gradio.Request,
    ) -> tuple[ReleaseReview | None, str, Any]:
        """Shows what would be done, with every reason against it; only without one it can be confirmed."""
        blocked = gradio.update(interactive=False)
        try:
            actor = caller_of(request).actor
            if not str(reason or "").strip():
                raise PromotionError("there is no reason", remedy="write the reason, which the log stores")
            if (
                action not in get_args(ReleaseAction)
                or not name
                or (not version and action in {"promote", "endorse", "withdraw"})
            ):
                raise PromotionError("nothing is chosen", remedy="choose an adapter, an action and a version")
            found = review_release(
                self._home, cast("ReleaseAction", action), name, str(version), str(alias or ""), actor=actor
            )
        except WordedError as error:
            return None, show_error(error), blocked
        if found.reasons:
            return None, show_refusal(f"Refused: {found.summary}", found.reasons), blocked
        warnings = "".join(f"<li>{escape(warning)}</li>" for warning in found.warnings)
        text = f'<div class="studio-done" role="status">As {escape(found.actor)}: <b>{escape(found.summary)}</b>. '
        return found, f"{text}Confirm to do it.<ul>{warnings}</ul></div>", gradio.update(interactive=True)

    def forget(self) -> tuple[None, str, Any]:
        """Forgets a review, because the form changed."""
        return None, "", gradio.update(interactive=False)

    def confirm(self, found: ReleaseReview | None, reason: str, request: gradio.Request) -> tuple[None, str, Any]:
        """Does what was reviewed, if the state is still that of the review."""
        try:
            actor = caller_of(request).actor
            if found is None:
                raise PromotionError("nothing was reviewed", remedy="review the action first")
            event = carry_out(self._home, found, str(reason or ""), actor=actor)
        except WordedError as error:
            return None, show_error(error), gradio.update(interactive=False)
        return None, show_done(f"Done: {found.summary} (event {event.seq})."), gradio.update(interactive=False)


def _label(version: AdapterVersion) -> str:
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    return f"{version.ref}{aliases}"


def _aliases(states: list[AliasState]) -> str:
    rows = []
    for state in states:
        policy = '<span class="studio-tag studio-good">met</span>'
        if state.reasons:
            reasons = "".join(f"<li>{escape(reason)}</li>" for reason in state.reasons)
            policy = f'<span class="studio-tag studio-bad">not met</span><ul>{reasons}</ul>'
        elif state.overridden:
            policy += f" overridden: {escape('; '.join(state.overridden))}"
        since = f"{state.since:%Y-%m-%d %H:%M}" if state.since else ""
        ref = f"<b>{escape(state.name)}@{escape(state.alias)}</b>"
        rows.append((ref, str(state.version), since, escape(state.actor), escape(state.moved_because), policy))
    return show_table(("Alias", "Version", "Since (UTC)", "By", "Because", "Policy"), rows, label="Aliases")


def _versions(versions: list[AdapterVersion], votes: dict[str, str]) -> str:
    rows = [
        (
            f"<b>{escape(version.ref)}</b>",
            escape(", ".join(version.aliases) if version.state == "ACTIVE" else version.state.lower()),
            escape(version.gate_status),
            votes.get(version.ref, ""),
            f"{version.created_at:%Y-%m-%d %H:%M}",
            version.sha256[:12],
        )
        for version in reversed(versions)
    ]
    return show_table(("Version", "Aliases", "Gates", "Votes", "Created (UTC)", "sha256"), rows, label="Versions")


def _history(events: list[Event]) -> str:
    rows = [
        (
            str(event.seq),
            f"{event.at:%Y-%m-%d %H:%M}",
            escape(event.action),
            escape(
                f"{event.alias}: {event.before or 'none'} → {event.after or 'none'}"
                if event.alias
                else str(event.after)
            ),
            escape(event.actor),
            escape(event.reason),
        )
        for event in events
    ]
    return show_table(("Event", "Time (UTC)", "Action", "Version", "User", "Reason"), rows, label="History")
