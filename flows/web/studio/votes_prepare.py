"""The form of the tab Votes that draws a new comparison with the studio's own queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.callers import caller_of
from flows.web.studio.page_messages import show_done, show_error
from lora_engine.errors import SettingsError, WordedError
from registry.errors import VoteError
from registry.versions.versions import Versions
from tasks.operations.draw_request import DrawRequest
from tasks.operations.votes import ComparisonRequest, prepare_comparison
from tasks.serving.job import JobState
from tasks.serving.service import ImageService

if TYPE_CHECKING:
    from flows.web.studio.context import Studio

_MOST_PROMPTS = 200


def add_prepare(studio: Studio, chosen: Any, list_choices: Callable[..., Any], outputs: list[Any]) -> None:
    """Adds the form; a finished comparison becomes the chosen one.

    Args:
        studio: What the page works with.
        chosen: The list of comparisons.
        list_choices: Lists them, and opens one.
        outputs: Its outputs.
    """
    form = _Prepare(studio)
    options: dict[str, Any] = {"api_visibility": "private"}
    with gradio.Accordion("Prepare a comparison", open=False) as accordion:
        with gradio.Row():
            version = gradio.Dropdown([], label="Version", interactive=True)
            against = gradio.Dropdown([], label="Against", interactive=True)
        prompts = gradio.Textbox(label="Prompts, one per line", lines=4, max_lines=12)
        with gradio.Row():
            count = gradio.Number(2, label="Seeds per prompt", minimum=1, precision=0)
            seed = gradio.Number(0, label="First seed", minimum=0, precision=0)
            steps = gradio.Number(20, label="Steps", minimum=1, precision=0)
        prepare = gradio.Button("Draw the pairs", variant="primary")
        message = gradio.HTML(apply_default_css=False, padding=False, min_height=40)
    accordion.expand(form.list_versions, None, [version, against], show_progress="hidden", **options)
    version.input(form.list_others, version, against, show_progress="hidden", **options)
    inputs = [version, against, prompts, count, seed, steps]
    # One at a time: a comparison is a long series of images.
    event = prepare.click(form.prepare, inputs, [chosen, message], concurrency_limit=1, **options)
    event.success(list_choices, chosen, outputs, show_progress="hidden", **options)


class _Prepare:
    """The events of the form.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._service = studio.service
        self._home = studio.service.home

    def list_versions(self) -> tuple[Any, Any]:
        """Returns the active versions, the latest first, and what the first can be compared with."""
        with closing(Versions(self._home)) as versions:
            active = [version for version in versions.list() if version.state == "ACTIVE"]
        refs = [version.ref for version in sorted(active, key=lambda version: version.created_at, reverse=True)]
        value = refs[0] if refs else None
        return gradio.update(choices=refs, value=value), self.list_others(value)

    def list_others(self, ref: str | None) -> Any:
        """Returns what a version can be compared with: aliases first, then versions, then the base alone."""
        name = (ref or "").partition("@")[0]
        with closing(Versions(self._home)) as versions:
            own = [version for version in versions.list(name) if version.state == "ACTIVE" and version.ref != ref]
        aliases = [alias for version in own for alias in version.aliases]
        choices = [*aliases, *(version.ref for version in reversed(own)), "base"]
        return gradio.update(choices=choices, value="production" if "production" in aliases else choices[0])

    def prepare(
        self,
        ref: str | None,
        against: str | None,
        prompts: str,
        count: int,
        seed: int,
        steps: int,
        request: gradio.Request,
        progress: gradio.Progress = gradio.Progress(),  # noqa: B008 (Gradio finds it by the default)
    ) -> tuple[Any, str]:
        """Draws and records a comparison; returns its digest and a message."""
        try:
            if not ref or not against:
                raise SettingsError("no version is chosen", remedy="choose the version and what to compare it with")
            lines = tuple(dict.fromkeys(line.strip() for line in str(prompts).splitlines() if line.strip()))
            if not 1 <= len(lines) <= _MOST_PROMPTS:
                raise SettingsError(f"{len(lines)} prompts", allowed=f"1 to {_MOST_PROMPTS}, one per line")
            wanted = ComparisonRequest(lines, int(count), int(seed), base=self._service.settings.base, steps=int(steps))

            def draw_each(requests: Sequence[DrawRequest]) -> Iterator[Sequence[bytes]]:
                total = len(requests)
                for number, images in enumerate(_draw_in_queue(self._service, requests, caller_of(request).tenant), 1):
                    progress((number, total), desc="Drawing")
                    yield images

            artifact, index = prepare_comparison(
                self._home, ref, against, wanted, draw_each, actor=caller_of(request).actor
            )
        except WordedError as error:
            return gradio.skip(), show_error(error)
        equal = len(lines) * int(count) - len(index.pairs)
        left_out = f", {equal} left out because both images are equal" if equal else ""
        text = f"{index.candidate} against {index.against}: {len(index.pairs)} pairs{left_out}."
        choice = (text, artifact.sha256)
        return gradio.update(choices=[choice], value=artifact.sha256), show_done(text)


def _draw_in_queue(service: ImageService, requests: Sequence[DrawRequest], tenant: str) -> Iterator[list[bytes]]:
    """Yields the images of each request, drawn one after another by a service, so that others get their turns.

    Raises:
        VoteError: An image could not be drawn.
    """
    for request in requests:
        job = service.wait(service.submit(request, tenant=tenant).id)
        if job.state is not JobState.COMPLETED:
            raise VoteError(f"an image was not drawn ({job.state}): {job.error or request.prompt[:80]}")
        yield service.images(job.id)
