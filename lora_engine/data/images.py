"""Opens untrusted image files with a format allow-list and a pixel limit, and writes PNGs.

Pillow alone clips 16-bit grays to white, shows transparent pixels, ignores the camera's orientation and only warns of
small files that decode to gigabytes. Folder logic is in `ingest`, tensors are in `pixels`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from lora_engine.data.color import to_srgb
from lora_engine.data.folder import open_inside
from lora_engine.errors import DataError
from lora_engine.files import atomic_write

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 30

BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""The exceptions of Pillow's decoders and metadata readers on broken files."""
_PILLOW = r"PIL\."
# At DEBUG, Pillow logs the metadata of TIFF and EXIF.
logging.getLogger("PIL").setLevel(logging.INFO)
_FILTER = ("ignore", None, UserWarning, re.compile(_PILLOW), 0)


def open_image(path: Path, max_pixels: int = MAX_PIXELS, root: Path | None = None) -> Image.Image:
    """Opens an image as upright RGB with 8 bits per channel and without metadata.

    Scales 16-bit grays, composites transparency over white, converts the color profile to sRGB, applies the EXIF
    orientation.

    Args:
        path: The file; only regular files, because a pipe could block the reader.
        max_pixels: Largest number of pixels; checked before decoding.
        root: Links that lead out of this folder are refused; None takes the file's own folder.

    Raises:
        DataError: The file cannot be used; names the file and the problem.
    """
    return open_with_digest(path, max_pixels, root)[1]


def open_with_digest(path: Path, max_pixels: int = MAX_PIXELS, root: Path | None = None) -> tuple[str, Image.Image]:
    """Returns the SHA-256 of the file's bytes and the image (see `open_image`), opening the file once."""
    with open_inside(path, root or path.parent) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise DataError(f"is larger than {MAX_BYTES:,} bytes", where=path.name)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return digest, _decode(file, path.name, max_pixels)


def open_pillow(file: BinaryIO) -> ImageFile.ImageFile:
    """Opens a file of an allowed format with Pillow, and drops Pillow's warnings of broken metadata from then on.

    They name no file, and pixels are read all the same. `warnings.catch_warnings` would drop them for a while only, but
    images are decoded in several threads.
    """
    if _FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", category=UserWarning, module=_PILLOW)
    return Image.open(file, formats=IMAGE_FORMATS)


def write_image(path: Path, image: Image.Image) -> None:
    """Writes an RGB image as PNG without metadata: same pixels, same bytes."""
    atomic_write(path, encode_png(image))


def write_mask(path: Path, mask: Image.Image) -> None:
    """Writes a mask as 8-bit gray PNG without metadata: same values, same bytes."""
    atomic_write(path, _encode(mask, "L"))


def encode_png(image: Image.Image) -> bytes:
    """Returns the image as PNG bytes: 8-bit RGB, fixed compression, no time, no metadata."""
    return _encode(image, "RGB")


def _encode(image: Image.Image, mode: str) -> bytes:
    # Built from the pixels only, which drops all metadata.
    plain = Image.frombytes(mode, image.size, image.convert(mode).tobytes())
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=6, optimize=False)
    return buffer.getvalue()


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with open_pillow(file) as image:
            _check(image, name, max_pixels)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright, name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"has more than {max_pixels:,} pixels", where=name, remedy="make it smaller") from None
    except UnidentifiedImageError:
        raise DataError("is not a readable image", where=name, allowed=", ".join(IMAGE_FORMATS)) from None
    except BROKEN as error:
        raise DataError(f"is broken ({str(error) or type(error).__name__})", where=name) from None


def _check(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"has {width} x {height} = {width * height:,} pixels",
            where=name,
            allowed=f"at most {max_pixels:,}",
            remedy="make it smaller",
        )
    # A JPEG from a phone may contain a second frame (MPO), which is no animation.
    if image.format not in {"JPEG", "MPO"} and (frames := getattr(image, "n_frames", 1)) > 1:
        problem = f"has {frames} pages" if image.format == "TIFF" else "is animated"
        raise DataError(problem, where=name, allowed="still images", remedy="save one of them as a still image")
    if image.mode == "F":
        raise DataError("has floating-point values", where=name, allowed="8 or 16 bits", remedy="save it with 16 bits")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        gray = Image.fromarray(np.clip(np.rint(values * (255.0 / 65535.0)), 0, 255).astype(np.uint8))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            gray.paste(255, mask=Image.fromarray(((values == transparent) * 255).astype(np.uint8)))
        return gray.convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        opaque = Image.alpha_composite(white, rgba).convert("RGB")
        opaque.info["icc_profile"] = image.info.get("icc_profile")
        return to_srgb(opaque, name)
    return to_srgb(image if image.mode in {"RGB", "CMYK"} else image.convert("RGB"), name)
