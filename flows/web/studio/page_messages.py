"""Shows messages, errors with all reasons, tables and the state of jobs as HTML."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from html import escape

from lora_engine.errors import WordedError
from registry.errors import Refused
from tasks.operations.draw_request import DrawRequest
from tasks.serving.batch import BatchProgress, draw_all
from tasks.serving.job import Job, JobState, UnknownJob
from tasks.serving.service import ImageService


def show_error(error: WordedError) -> str:
    """Returns an error as an alert, which screen readers speak; each reason of a refusal has its own line."""
    if not isinstance(error, Refused):
        return f'<div class="studio-error" role="alert">{escape(str(error))}</div>'
    where = f"{error.where}: " if error.where else ""
    problem = error.problem.partition(": (1)")[0]
    fix = f'<div class="fix">Fix: {escape(error.remedy)}.</div>' if error.remedy else ""
    return show_refusal(where + problem, error.reasons, fix)


def show_refusal(problem: str, reasons: Iterable[str], fix: str = "") -> str:
    """Returns a refusal as an alert with its reasons; `fix` is HTML."""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f'<div class="studio-error" role="alert">{escape(problem)}<ul>{items}</ul>{fix}</div>'


def show_note(text: str) -> str:
    """Returns a short message, with commands between backticks as code; an empty one is hidden."""
    shown = re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))
    return f'<p class="studio-note" role="status">{shown}</p>' if text else ""


def show_done(text: str) -> str:
    """Returns the message of a change that was made."""
    return f'<div class="studio-done" role="status">{escape(text)}</div>'


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, label: str) -> str:
    """Returns a table that scrolls on narrow screens; empty without rows. Cells are HTML, which the caller escapes."""
    listed = list(rows)
    if not listed:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in listed)
    return (
        f'<div class="studio-scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Returns the bytes as a URL that needs no request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _show_job(job: Job, preview: bytes | None, *, done: int = 0, total: int = 1) -> str:
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
        yield _show_job(progress.job, preview, done=progress.done, total=len(requests)), progress


def cancel_own_job(service: ImageService, job_id: str, *, tenant: str) -> str:
    """Cancels a job of a tenant; returns what happened as HTML."""
    try:
        service.job(job_id, tenant=tenant)
        service.cancel(job_id)
    except UnknownJob:
        return show_note("Nothing is drawn at the moment.")
    return show_note("Canceling.")
