"""Shows the state of jobs, and the project's errors, as HTML."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape

import gradio

from lora_engine.errors import WordedError
from tasks.operations.draw_request import DrawRequest
from tasks.serving.batch import BatchProgress, draw_all
from tasks.serving.job import Job, JobState, UnknownJob
from tasks.serving.service import ImageService


def user_of(request: gradio.Request | None) -> str:
    """Returns the user of an event, for whom images are drawn; `local` on a server without login."""
    return str(getattr(request, "username", None) or "local")


def show_error(error: WordedError) -> str:
    """Returns an error as an alert, which screen readers speak."""
    return f'<div class="studio-error" role="alert">{escape(str(error))}</div>'


def show_note(text: str) -> str:
    """Returns a short message."""
    return f'<p class="studio-note" role="status">{escape(text)}</p>' if text else ""


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Returns the bytes as a URL that needs no request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def show_job(job: Job, preview: bytes | None, *, done: int = 0, total: int = 1) -> str:
    """Returns the place in the queue, or the progress and the image as it is now.

    Args:
        job: The job that is drawn or waits.
        preview: Its first image as a PNG file; None before the first step.
        done: Number of completed requests of the batch.
        total: Number of all its requests.
    """
    part = f"Image {done + 1} of {total}: " if total > 1 else ""
    if job.state is JobState.QUEUED:
        return f'<p role="status">{part}waiting in the queue at position {job.position}</p>'
    share = (done + job.step / max(job.steps, 1)) / total
    image = "" if preview is None else f'<img alt="Image after step {job.step}" src="{data_url(preview)}">'
    label = f"{part}step {job.step} of {job.steps}"
    return f'<p role="status">{label}</p><progress aria-label="Progress" max="1" value="{share:.3f}"></progress>{image}'


def follow(
    service: ImageService, requests: Sequence[DrawRequest], *, tenant: str
) -> Iterator[tuple[str, BatchProgress]]:
    """Draws requests; yields the state as HTML with what is done, and at last what is done with an empty state.

    Raises:
        WordedError: A request cannot be drawn, or was canceled.
    """
    for progress in draw_all(service, requests, tenant=tenant):
        if progress.job is None:
            yield "", progress
            continue
        preview = None
        with suppress(UnknownJob):
            preview = service.preview(progress.job.id)
        yield show_job(progress.job, preview, done=progress.done, total=len(requests)), progress


def cancel_job(service: ImageService, job_id: str, *, tenant: str) -> str:
    """Cancels a job of a tenant; returns what happened as HTML."""
    is_own = False
    with suppress(UnknownJob):
        is_own = service.job(job_id).tenant == tenant
        if is_own:
            service.cancel(job_id)
    return show_note("Canceling." if is_own else "Nothing is drawn at the moment.")
