"""How an untrusted picture file is opened: an allow-list, a cap on pixels, and nothing decided by accident.

Pillow alone clips 16-bit greys to white, shows what transparency hides, ignores the camera's orientation and only warns
about small files that unfold to gigabytes. No folder logic here (`ingest`), no tensors (`pixels`).
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import zlib
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_engine.errors import DataError
from lora_engine.files import atomic_write

FORMATS = ("PNG", "JPEG", "WEBP")
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
    struct.error,
    zlib.error,
)
"""What Pillow raises on broken files, by its decoders and its metadata readers."""


def open_image(path: Path, max_pixels: int = MAX_PIXELS, root: Path | None = None) -> Image.Image:
    """The picture as RGB, 8 bits a channel, upright, without metadata.

    16-bit greys are scaled, transparency is laid over white, the EXIF orientation is applied.

    Args:
        path: The file; regular files only, so that a pipe cannot make the reader wait.
        max_pixels: More is refused before anything is decoded.
        root: A link that leads out of this folder is refused; by default the file's own folder.

    Raises:
        DataError: Names the file and what is wrong with it.
    """
    return open_with_digest(path, max_pixels, root)[1]


def open_with_digest(path: Path, max_pixels: int = MAX_PIXELS, root: Path | None = None) -> tuple[str, Image.Image]:
    """The SHA-256 of the file's bytes and the picture (see `open_image`), both from one opening of the file."""
    with open_regular(path, root or path.parent) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise DataError(f"is larger than {MAX_BYTES:,} bytes", where=path.name)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return digest, _decode(file, path.name, max_pixels)


def open_regular(path: Path, root: Path) -> BufferedReader:
    """Opens a regular file inside the root for reading.

    Raises:
        DataError: It is a link out of the root, a pipe, a device or a folder, or it cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise DataError("is a link that leads out of the folder", where=path.name, remedy="copy the file instead")
        # Without waiting (a pipe has no writer) and without following a link that was put there since.
        descriptor = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=path.name) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError("is not a regular file", where=path.name, allowed="files, not pipes, devices or folders")
    return os.fdopen(descriptor, "rb")


def write_image(path: Path, picture: Image.Image) -> None:
    """Writes an RGB picture as PNG without metadata: same pixels, same bytes."""
    atomic_write(path, encode_png(picture))


def write_mask(path: Path, mask: Image.Image) -> None:
    """Writes a mask as 8-bit grey PNG without metadata: same values, same bytes."""
    atomic_write(path, _encode(mask, "L"))


def encode_png(picture: Image.Image) -> bytes:
    """The picture as PNG bytes: 8-bit RGB, fixed compression, no time, no metadata."""
    return _encode(picture, "RGB")


def _encode(picture: Image.Image, mode: str) -> bytes:
    # Out of the bytes alone, so that nothing which the picture carried comes along.
    plain = Image.frombytes(mode, picture.size, picture.convert(mode).tobytes())
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=6, optimize=False)
    return buffer.getvalue()


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as picture:
            _check(picture, name, max_pixels)
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            return _to_rgb(upright)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"has more than {max_pixels:,} pixels", where=name, remedy="make it smaller") from None
    except UnidentifiedImageError:
        raise DataError("is not a picture that can be read", where=name, allowed=", ".join(FORMATS)) from None
    except BROKEN as error:
        raise DataError(f"is broken ({str(error) or type(error).__name__})", where=name) from None


def _check(picture: Image.Image, name: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise DataError(
            f"has {width} x {height} = {width * height:,} pixels",
            where=name,
            allowed=f"at most {max_pixels:,}",
            remedy="make it smaller",
        )
    # A JPEG from a phone may carry a second picture (MPO), which is no animation.
    if picture.format in {"PNG", "WEBP"} and getattr(picture, "n_frames", 1) > 1:
        raise DataError("is animated", where=name, allowed="still pictures", remedy="save the wanted frame as a still")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.float64)
        grey = Image.fromarray(np.clip(np.rint(values * (255.0 / 65535.0)), 0, 255).astype(np.uint8))
        hidden = picture.info.get("transparency")
        if isinstance(hidden, int):
            grey.paste(255, mask=Image.fromarray(((values == hidden) * 255).astype(np.uint8)))
        return grey.convert("RGB")
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return picture.convert("RGB")
