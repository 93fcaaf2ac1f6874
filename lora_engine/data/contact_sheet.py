"""Renders an examined folder as one self-contained HTML page: every image with caption, part in training, and flaws."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2

from lora_engine.data.examination import Examination, Examined
from lora_engine.data.images import encode_png

_PIXEL_ART_SIDE = 128
_ROLES = {"train": "", "heldout": "held out", "class": "class image"}


def render_contact_sheet(title: str, examination: Examination) -> str:
    """Returns the page; all text from files is escaped, and the page loads nothing."""
    groups = {index: number for number, group in enumerate(examination.groups, start=1) for index in group}
    return _template().render(
        title=title,
        summary=examination.manifest.describe(),
        advice=examination.advice,
        images=[_card(image, groups.get(index)) for index, image in enumerate(examination.images)],
        quarantined=examination.manifest.quarantined,
    )


def _card(image: Examined, group: int | None) -> dict[str, Any]:
    entry = image.entry
    notes = [_ROLES[entry.split], f"{entry.repeats} repeats" if entry.repeats > 1 else "", "mask" if entry.mask else ""]
    return {
        "uri": _data_uri(image),
        "pixel_art": max(entry.width, entry.height) <= _PIXEL_ART_SIDE,
        "source": entry.source,
        "size": f"{entry.width} x {entry.height}",
        "caption": entry.caption,
        "origin": entry.caption_origin,
        "notes": [note for note in notes if note],
        "flaws": [*image.flaws, *([f"like others of group {group}"] if group is not None else [])],
    }


def _data_uri(image: Examined) -> str:
    if max(image.entry.width, image.entry.height) <= _PIXEL_ART_SIDE:
        return f"data:image/png;base64,{base64.b64encode(encode_png(image.thumbnail)).decode()}"
    buffer = io.BytesIO()
    image.thumbnail.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("contact_sheet.html")
