"""The tab Datasets: a contact sheet of a dataset, whose captions are changed in the folder it was read from."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.callers import caller_of
from flows.web.studio.page_messages import show_done, show_error, show_note
from flows.web.studio.page_style import QUIET
from lora_engine.errors import DataError, WordedError
from registry.entities import ArtifactRef
from tasks.operations.caption_edits import CaptionEdit, edit_caption, undo_caption
from tasks.operations.dataset_sheet import (
    SheetImage,
    find_folders,
    list_datasets,
    read_sheet,
    read_thumbnail,
    require_folder,
)
from tasks.operations.report import read_manifest

if TYPE_CHECKING:
    from flows.web.studio.context import Studio

_PAGE = 60
_ON_LOAD = """
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-image]");
  if (button) trigger("select", {source: button.dataset.image});
});
"""


def add_datasets(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`."""
    tab = _Datasets(studio)
    with gradio.Row():
        chosen = gradio.Dropdown([], label="Dataset", interactive=True, scale=3)
        folder = gradio.Dropdown([], label="Folder", interactive=True, scale=3)
        page = gradio.Number(1, label="Page", minimum=1, precision=0, scale=1, min_width=90)
        refresh = gradio.Button("Refresh", scale=0, min_width=110, elem_classes="studio-refresh")
    with gradio.Row():
        source = gradio.Textbox(label="Image", interactive=False, scale=1)
        caption = gradio.Textbox(label="Caption", scale=4, max_length=2_000, placeholder="Choose an image below")
    with gradio.Row():
        save = gradio.Button("Save caption", variant="primary")
        undo = gradio.Button("Undo last change")
    message = gradio.HTML(apply_default_css=False, padding=False, min_height=40)
    sheet = gradio.HTML(apply_default_css=False, js_on_load=_ON_LOAD, elem_id="data-sheet")
    before = gradio.State("")
    gradio.on([studio.page.load, refresh.click], tab.list_choices, chosen, [chosen, folder, sheet, message], **QUIET)
    chosen.input(tab.find_folder, chosen, [folder, sheet, message], **QUIET)
    gradio.on([folder.input, page.input], tab.show, [chosen, folder, page], [sheet, message], **QUIET)
    sheet.select(tab.choose, [chosen, folder], [source, caption, before, message], **QUIET)
    inputs = [chosen, folder, source, caption, before]
    event = gradio.on([save.click, caption.submit], tab.save, inputs, [before, message], **QUIET)
    event.then(tab.sheet, [chosen, folder, page], sheet, **QUIET)
    undone = undo.click(tab.undo, folder, [source, caption, before, message], **QUIET)
    undone.then(tab.sheet, [chosen, folder, page], sheet, **QUIET)


class _Datasets:
    """The events of the tab.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._home = studio.service.home

    def list_choices(self, chosen: str | None) -> tuple[Any, Any, str, str]:
        """Returns the datasets, and shows the chosen one or the first."""
        try:
            entries = list_datasets(self._home)
        except WordedError as error:
            return gradio.skip(), gradio.skip(), "", show_error(error)
        if not entries:
            empty = show_note("No dataset yet. `loraline run` with an `ingest` step makes one.")
            return gradio.update(choices=[], value=None), gradio.update(choices=[], value=None), empty, ""
        choices = [(f"{entry.pipeline}: {entry.step}", entry.artifact.sha256) for entry in entries]
        value = chosen if chosen in {digest for _, digest in choices} else choices[0][1]
        return gradio.update(choices=choices, value=value), *self.find_folder(value)

    def find_folder(self, chosen: str | None) -> tuple[Any, str, str]:
        """Returns the folders that have the images of a dataset, and its sheet."""
        try:
            manifest = read_manifest(self._home, self._artifact(chosen))
            folders = [str(folder) for folder in find_folders(self._home, manifest)]
        except WordedError as error:
            return gradio.skip(), "", show_error(error)
        value = folders[0] if folders else None
        return gradio.update(choices=folders, value=value), *self.show(chosen, value, 1)

    def show(self, chosen: str | None, folder: str | None, page: float) -> tuple[str, str]:
        """Returns a page of the sheet, and why captions cannot be changed."""
        try:
            sheet = self.sheet(chosen, folder, page)
        except WordedError as error:
            return "", show_error(error)
        found = "" if folder else "Read only: no folder with these images is below `datasets` of loraline.yaml."
        return sheet, show_note(found)

    def sheet(self, chosen: str | None, folder: str | None, page: float) -> str:
        """Returns a page of the sheet."""
        artifact = self._artifact(chosen)
        images = read_sheet(self._home, artifact, require_folder(self._home, folder) if folder else None)
        start = max(0, int(page or 1) - 1) * _PAGE
        cards = "".join(self._card(artifact, image) for image in images[start : start + _PAGE])
        pages = -(-len(images) // _PAGE)
        count = show_note(f"{len(images)} images, page {int(page or 1)} of {pages}")
        return f'{count}<div class="data-sheet">{cards}</div>'

    def choose(self, chosen: str | None, folder: str | None, event: gradio.EventData) -> tuple[str, Any, str, str]:
        """Puts the caption of an image into the field."""
        source = str(getattr(event, "source", ""))
        try:
            found = self._find(chosen, folder, source)
        except WordedError as error:
            return "", gradio.skip(), "", show_error(error)
        why = show_note(f"Cannot be changed: {found.locked}") if found.locked else ""
        return source, gradio.update(value=found.caption, interactive=not found.locked), found.beside, why

    def save(
        self,
        chosen: str | None,
        folder: str | None,
        source: str,
        caption: str,
        before: str,
        request: gradio.Request,
    ) -> tuple[Any, str]:
        """Writes a caption beside its image."""
        try:
            actor = caller_of(request).actor
            if not source or not folder:
                raise DataError("no image is chosen", remedy="choose an image of a dataset with a folder")
            path = require_folder(self._home, folder)
            digest = self._find(chosen, folder, source).entry.sha256
            edit = edit_caption(
                self._home, path, source, str(caption), expected=str(before), sha256=digest, actor=actor
            )
        except WordedError as error:
            return gradio.skip(), show_error(error)
        return edit.after or "", show_done(f"Wrote {edit.file}. The next run uses it.")

    def undo(self, folder: str | None, request: gradio.Request) -> tuple[str, Any, str, str]:
        """Takes the last change in the folder back."""
        try:
            actor = caller_of(request).actor
            if not folder:
                raise DataError("there is no folder", remedy="choose a dataset with a folder")
            edit: CaptionEdit = undo_caption(self._home, require_folder(self._home, folder), actor=actor)
        except WordedError as error:
            return "", gradio.skip(), "", show_error(error)
        text = (
            f"Restored {edit.file}." if edit.after is not None else f"Removed {edit.file}, which did not exist before."
        )
        return edit.source, edit.after or "", edit.after or "", show_done(text)

    def _artifact(self, chosen: str | None) -> ArtifactRef:
        """Returns a dataset of the list, by its digest: no other artifact is shown."""
        for entry in list_datasets(self._home):
            if entry.artifact.sha256 == chosen:
                return entry.artifact
        raise DataError(f"no dataset {str(chosen)[:12]!r}", remedy="load the list again")

    def _find(self, chosen: str | None, folder: str | None, source: str) -> SheetImage:
        path: Path | None = require_folder(self._home, folder) if folder else None
        for image in read_sheet(self._home, self._artifact(chosen), path):
            if image.entry.source == source:
                return image
        raise DataError(f"no image {source[:80]!r} in this dataset", remedy="choose another image")

    def _card(self, artifact: ArtifactRef, image: SheetImage) -> str:
        entry, small = image.entry, read_thumbnail(self._home, artifact, image.entry)
        shown = (
            ""
            if small is None
            else f'<img class="{"pixel" if small["pixel_art"] else ""}" alt="" src="{small["uri"]}">'
        )
        roles = {"heldout": "held out", "class": "class image"}
        marks = [roles.get(entry.split, ""), "changed since the last run" if image.is_changed else ""]
        tags = ", ".join(mark for mark in marks if mark)
        return (
            f'<button data-image="{escape(entry.source)}">{shown}<b>{escape(entry.source)}</b>'
            f'<span class="caption">{escape(image.caption) or "no caption"}</span>'
            f"{f'<br><i>{escape(tags)}</i>' if tags else ''}</button>"
        )
