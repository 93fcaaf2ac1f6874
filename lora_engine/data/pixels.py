"""Converts images to tensors and back. The only module of `data` that imports torch at module level."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_engine.data.images import open_image, write_image
from lora_engine.errors import DataError


def read_pixels(path: Path) -> Tensor:
    """Reads an image as a float32 tensor [3, height, width] in [-1, 1].

    Raises:
        DataError: The file cannot be used (see `open_image`).
    """
    return to_pixels(open_image(path))


def read_mask(path: Path) -> Tensor:
    """Reads a mask as a float32 tensor [1, height, width] in [0, 1]; 1 is full weight.

    Raises:
        DataError: The file cannot be used (see `open_image`).
    """
    values = torch.from_numpy(np.array(open_image(path).convert("L"), dtype=np.float32))
    return (values / 255.0)[None]


def to_pixels(image: Image.Image) -> Tensor:
    """Converts an RGB image to a float32 tensor [3, height, width] in [-1, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return (values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Converts a tensor [3, height, width] in [-1, 1] (clipped) to an RGB image.

    Raises:
        DataError: The shape differs, or a value is NaN or Inf.
    """
    if pixels.dim() != 3 or pixels.shape[0] != 3:
        raise DataError(f"pixels have the shape {tuple(pixels.shape)}", allowed="(3, height, width)")
    values = pixels.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise DataError("pixels contain NaN or Inf", remedy="check the model that generated them")
    scaled = ((values.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).contiguous().numpy())


def write_png(path: Path, pixels: Tensor, texts: Mapping[str, str] | None = None) -> None:
    """Writes a tensor [3, height, width] in [-1, 1] as an 8-bit PNG with texts: same values, same bytes.

    Raises:
        DataError: See `to_image`.
    """
    write_image(path, to_image(pixels), texts)
