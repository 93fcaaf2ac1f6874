"""Requests for the own endpoints of `loraline serve`; the fixture `client` sends them."""

from __future__ import annotations

import base64
import io

from PIL import Image

BODY = {"prompt": "a zorb <lora:zorb:0.7>", "steps": 2, "seed": 5}
ADDRESS = "http://127.0.0.1"


def png_of(size: tuple[int, int] = (32, 32)) -> str:
    """Returns a red image as a PNG file in base64."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
