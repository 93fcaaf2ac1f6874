"""Makes self-contained HTML pages: templates that escape all text, and images in the page itself."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from lora_engine.data.images import encode_png

_PIXEL_ART_SIDE = 128
"""Images of at most this side in pixels are shown enlarged, with their pixels visible, and lose nothing."""


@functools.cache
def load_template(file: Path) -> jinja2.Template:
    """Returns a template that escapes the values in it, and refuses unknown ones."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(file.name)


def embed_image(image: Image.Image, side: int, quality: int) -> dict[str, Any]:
    """Returns an RGB image for a page: its data URI, width and height in pixels, and whether it is pixel art.

    Args:
        image: The image; a larger one is shrunk in place.
        side: Largest side in pixels.
        quality: Quality of the JPEG, 1 to 95; pixel art is a PNG.
    """
    pixel_art = max(image.size) <= _PIXEL_ART_SIDE
    if pixel_art:
        kind, content = "png", encode_png(image)
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        kind, content = "jpeg", buffer.getvalue()
    return {
        "uri": f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        "width": image.width,
        "height": image.height,
        "pixel_art": pixel_art,
    }
