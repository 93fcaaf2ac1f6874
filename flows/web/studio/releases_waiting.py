"""The part of the tab Releases with the scheduled runs that wait for an approval."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Literal

import gradio
import httpx

from flows.approving import decide_waiting, list_waiting
from flows.web.callers import caller_of
from flows.web.studio.page_messages import show_done, show_error, show_note, show_table
from lora_engine.errors import WordedError
from registry.errors import PromotionError

if TYPE_CHECKING:
    from flows.waiting_runs import WaitingRun
    from flows.web.studio.context import Studio


def add_waiting(studio: Studio) -> None:
    """Adds the list of waiting runs, with buttons that approve and reject."""
    part = _Waiting(studio)
    options: dict[str, Any] = {"api_visibility": "private"}
    with gradio.Accordion("Waiting for approval", open=False) as accordion:
        listed = gradio.HTML(apply_default_css=False, padding=False)
        with gradio.Row():
            run = gradio.Dropdown([], label="Run", interactive=True)
            reason = gradio.Textbox(label="Reason of the decision", max_length=2_000)
        with gradio.Row():
            approve = gradio.Button("Approve", variant="primary")
            reject = gradio.Button("Reject", variant="stop")
        message = gradio.HTML(apply_default_css=False, padding=False)
    accordion.expand(part.show, None, [listed, run], **options)
    for button, function in ((approve, part.approve), (reject, part.reject)):
        event = button.click(function, [run, reason], message, **options)
        event.then(part.show, None, [listed, run], show_progress="hidden", **options)


class _Waiting:
    """The events of the part.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._home = studio.service.home

    def show(self) -> tuple[str, Any]:
        """Returns the waiting runs."""
        try:
            waiting = list_waiting(self._home)
        except WordedError as error:
            return show_error(error), gradio.skip()
        except (OSError, httpx.HTTPError) as error:
            return show_note(f"Prefect's server cannot be reached: {error}"), gradio.update(choices=[], value=None)
        if waiting is None:
            return show_note("No Prefect server is configured (PREFECT_API_URL)."), gradio.update(
                choices=[], value=None
            )
        choices = [(run.request.message, _key(run)) for run in waiting]
        rows = [(escape(run.name), escape(run.request.message)) for run in waiting]
        listed = show_table(("Run", "Waits for"), rows, label="Waiting runs") or show_note(
            "No run waits for an approval."
        )
        return listed, gradio.update(choices=choices, value=choices[0][1] if choices else None)

    def approve(self, chosen: str | None, reason: str, request: gradio.Request) -> str:
        """Approves the version that a run waits for."""
        return self._decide("approve", chosen, reason, request)

    def reject(self, chosen: str | None, reason: str, request: gradio.Request) -> str:
        """Rejects the version that a run waits for."""
        return self._decide("reject", chosen, reason, request)

    def _decide(
        self, decision: Literal["approve", "reject"], chosen: str | None, reason: str, request: gradio.Request
    ) -> str:
        ref, _, digest = (chosen or "").partition("#")
        try:
            if not digest:
                raise PromotionError("no run is chosen", remedy="choose the run to decide about")
            version, run, _ = decide_waiting(
                self._home, ref, decision, str(reason or ""), expect=digest, actor=caller_of(request).actor
            )
        except WordedError as error:
            return show_error(error)
        word = "Approved" if decision == "approve" else "Rejected"
        return show_done(
            f"{word} {version.ref} for {run.request.alias}. The run {run.name} continues once a worker is free."
        )


def _key(run: WaitingRun) -> str:
    """Returns the reviewed version of a run with its digest: a later answer is about this version or none."""
    return f"{run.request.ref}#{run.request.sha256}"
