"""Renders an examined folder as one self-contained HTML page: every image with caption, part in training, and flaws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_engine.data.examination import THUMBNAIL, Examination, Examined
from lora_engine.data.pages import embed_image, load_template

_PAGE = Path(__file__).with_name("contact_sheet.html")
_QUALITY = 85
_ROLES = {"train": "", "heldout": "held out", "class": "class image"}


def render_contact_sheet(title: str, examination: Examination) -> str:
    """Returns the page; all text from files is escaped, and the page loads nothing."""
    groups = {index: number for number, group in enumerate(examination.groups, start=1) for index in group}
    return load_template(_PAGE).render(
        title=title,
        summary=examination.manifest.describe(),
        prepared=examination.prepared.describe_preparation() if examination.prepared else "",
        advice=examination.advice,
        images=[
            _card(image, groups.get(index), examination.ratings.get(image.entry.source))
            for index, image in enumerate(examination.images)
        ],
        quarantined=(examination.prepared or examination.manifest).quarantined,
        skipped=examination.manifest.skipped or (),
    )


def _card(image: Examined, group: int | None, rating: float | None) -> dict[str, Any]:
    entry = image.entry
    generation = entry.rights.describe_generation() if entry.rights is not None else ""
    notes = [
        _ROLES[entry.split],
        f"{entry.repeats} repeats" if entry.repeats > 1 else "",
        "mask" if entry.mask else "",
        generation,
        f"rating {rating:.1f}" if rating is not None else "",
        *(image.preparation.describe() if image.preparation is not None else []),
    ]
    return {
        **embed_image(image.thumbnail, THUMBNAIL, _QUALITY),
        "review": embed_image(image.review, THUMBNAIL, _QUALITY) if image.review is not None else None,
        "source": entry.source,
        "size": f"{entry.width} x {entry.height}",
        "captions": entry.captions,
        "origin": entry.caption_origin,
        "notes": [note for note in notes if note],
        "flaws": [*image.flaws, *([f"like others of group {group}"] if group is not None else [])],
    }
