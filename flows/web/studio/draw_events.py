"""The events of the tab Draw: draws images with previews, and restores settings from images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.callers import caller_of
from flows.web.studio.cards import CardList
from flows.web.studio.draw_form import DrawForm, Used, compose_prompt, fill, request_of, split_prompt, updates
from flows.web.studio.page_messages import follow, show_error, show_note
from lora_engine.errors import WordedError
from lora_engine.inference.image_settings import read_image_settings
from lora_engine.inference.prompts.step_weights import StepWeights
from lora_engine.inference.prompts.tags import AdapterTag
from registry.home import Home
from tasks.serving.batch import DrawingFailed
from tasks.serving.catalog import resolve_labels

if TYPE_CHECKING:
    from flows.web.studio.context import Studio


@dataclass(frozen=True)
class DrawResults:
    """Components with what was drawn.

    Attributes:
        status: State of the job, or an error.
        gallery: The images.
        files: The same files, to download.
        job: State: identifier of the job that is drawn.
        chosen: State: number of the chosen image.
    """

    status: gradio.HTML
    gallery: gradio.Gallery
    files: gradio.File
    job: gradio.State
    chosen: gradio.State


class DrawEvents:
    """Functions of the events.

    Args:
        studio: What the page works with.
        cards: The cards.
    """

    def __init__(self, studio: Studio, cards: CardList) -> None:
        self._studio, self._cards = studio, cards

    def draw(self, request: gradio.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Draws the images of the form; yields status, gallery, files, job and seed."""
        studio, skip = self._studio, gradio.skip()
        try:
            wanted = request_of(DrawForm.values(values), studio.service.settings.base, studio.files.folder)
            yield show_note("Sending the request."), skip, skip, "", wanted.seed
            for status, progress in follow(studio.service, [wanted], tenant=caller_of(request).tenant):
                if progress.job is not None:
                    yield status, skip, skip, progress.job.id, skip
            files = [
                studio.files.write(content, f"{wanted.seed + place}.png")
                for place, content in enumerate(progress.images[0] or ())
            ]
            captions = [(path, f"seed {Path(path).stem}") for path in files]
            yield show_note(f"Drawn: seed {wanted.seed}."), captions, files, "", skip
        except DrawingFailed as error:
            note = show_note("Canceled.") if "canceled" in error.problem else show_error(error)
            yield note, skip, skip, "", skip
        except WordedError as error:
            yield show_error(error), skip, skip, "", skip

    def choose_card(
        self, text: str, used: list[Used], layout: int, event: gradio.EventData
    ) -> tuple[str, list[Used], int, str, str, str]:
        """Uses the adapter of a card, or adds its trigger words to the text."""
        action, card = self._cards.find(event)
        if card is None:
            composed = compose_prompt(text, used)
            return text, used, layout, composed, composed, show_note("The adapter does not exist any more.")
        if action == "words":
            missing = [word for word in card.triggers if word not in text]
            text = ", ".join(filter(None, [text.strip(), *missing]))
            note = f"The prompt has {', '.join(card.triggers)}."
        else:
            weights = StepWeights(((0.0, card.weight if card.weight is not None else 1.0),))
            used = [*used, Used(AdapterTag(card.references[0], weights, weights))]
            layout, note = layout + 1, f"{card.references[0]} is used."
        composed = compose_prompt(text, used)
        return text, used, layout, composed, composed, show_note(note)

    def edit_prompt(self, prompt: str, composed: str, layout: int) -> list[Any]:
        """Takes text and adapters from the whole prompt that the user edited; returns also a message."""
        if prompt == composed:
            return [gradio.skip()] * 6
        try:
            text, used = split_prompt(prompt)
        except WordedError as error:
            return [*[gradio.skip()] * 5, show_error(error)]
        composed = compose_prompt(text, used)
        return [text, used, layout + 1, composed, composed, ""]

    def restore(self, path: str | None, layout: int) -> list[Any]:
        """Fills the form with the settings of a PNG; returns also a message."""
        if not path:
            return [*updates({}), gradio.skip()]
        try:
            values, notes = restore_settings(path, layout, self._studio.service.home)
            return [*updates(values), show_note("; ".join(["The settings of the image are restored.", *notes]))]
        except WordedError as error:
            return [*updates({}), show_error(error)]

    def restore_chosen(self, files: Sequence[Any] | None, chosen: int, layout: int) -> list[Any]:
        """Fills the form with the settings of the chosen result."""
        path = path_of_chosen(files, chosen)
        if path is None:
            return [*updates({}), show_note("Draw or choose an image first.")]
        return self.restore(path, layout)

    def start_from(self, files: Sequence[Any] | None, chosen: int) -> tuple[Any, str]:
        """Puts the chosen result into the editor of the image to start from."""
        path = path_of_chosen(files, chosen)
        if path is None:
            return gradio.skip(), show_note("Draw or choose an image first.")
        return {"background": path, "layers": [], "composite": path}, show_note("The next images start from it.")


def restore_settings(path: str, layout: int, home: Home) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns values of the form that restore the settings of a PNG, and what was not restored.

    Raises:
        DataError: The file states no settings that can be read.
        SettingsError: The prompt cannot be read.
    """
    settings = read_image_settings(Path(path))
    if settings.has_labels:
        settings = replace(settings, prompt=resolve_labels(settings.prompt, home))
    return fill(settings, layout), settings.notes


def recompose(text: str, used: list[Used]) -> tuple[str, str]:
    """Returns the whole prompt of a text and the chosen adapters, twice."""
    composed = compose_prompt(text, used)
    return composed, composed


def choose_image(event: gradio.SelectData) -> int:
    """Returns the number of the chosen image."""
    return int(event.index)


def path_of_chosen(files: Sequence[Any] | None, chosen: int) -> str | None:
    """Returns the path of the chosen file; Gradio lets only files of its cache through as inputs."""
    return str(files[min(max(int(chosen), 0), len(files) - 1)]) if files else None
