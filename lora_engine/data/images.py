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
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from lora_engine.data.color import to_srgb
from lora_engine.data.folder import open_inside
from lora_engine.errors import DataError
from lora_engine.files import atomic_write

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
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
Color = tuple[int, int, int]
_WHITE: Color = (255, 255, 255)
_PILLOW = r"PIL\."
# Rows of 16-bit values that are scaled at a time, as 64-bit ones.
_ROWS = 256
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
    return open_with_alpha(path, max_pixels, root)[:2]


def open_with_alpha(
    path: Path, max_pixels: int = MAX_PIXELS, root: Path | None = None, background: Color = _WHITE
) -> tuple[str, Image.Image, Image.Image | None]:
    """Returns what `open_with_digest` does, over another background, and how opaque the image is.

    Returns:
        The digest, the RGB image, and its opacity (gray, 255 is opaque); None for an image that is opaque everywhere.
    """
    with open_inside(path, root or path.parent) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise DataError(f"is larger than {MAX_BYTES:,} bytes", where=path.name)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return digest, *_decode(file, path.name, max_pixels, background)


def open_pillow(file: BinaryIO) -> ImageFile.ImageFile:
    """Opens a file of an allowed format with Pillow, and drops Pillow's warnings of broken metadata from then on.

    They name no file, and pixels are read all the same. `warnings.catch_warnings` would drop them for a while only, but
    images are decoded in several threads.
    """
    if _FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", category=UserWarning, module=_PILLOW)
    start = file.read(12)
    file.seek(0)
    is_heic = start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS
    return Image.open(file, formats=(*IMAGE_FORMATS, *(_register_heic() if is_heic else ())))


def _register_heic() -> tuple[str, ...]:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener(thumbnails=False)
    return ("HEIF",)


def _explain_unreadable(file: BinaryIO, name: str) -> DataError:
    file.seek(4)
    if (kind := file.read(8))[:4] == b"ftyp" and kind[4:] in _HEIC_BRANDS and not _register_heic():
        return DataError("is HEIC, which needs pillow-heif: pip install 'loraline[heic]'", where=name)
    return DataError("is not a readable image", where=name, allowed=", ".join(IMAGE_FORMATS))


def write_image(path: Path, image: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Writes an RGB image as PNG, without metadata but the texts by keyword: same pixels and texts, same bytes."""
    atomic_write(path, _encode(image, "RGB", texts))


def write_mask(path: Path, mask: Image.Image) -> None:
    """Writes a mask as 8-bit gray PNG without metadata: same values, same bytes."""
    atomic_write(path, encode_mask(mask))


def encode_png(image: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """Returns the image as PNG bytes: 8-bit RGB, fixed compression, no time, no metadata but the texts by keyword."""
    return _encode(image, "RGB", texts)


def encode_mask(mask: Image.Image) -> bytes:
    """Returns the mask as PNG bytes: 8-bit gray, as `encode_png`."""
    return _encode(mask, "L")


def _encode(image: Image.Image, mode: str, texts: Mapping[str, str] | None = None) -> bytes:
    # Built from the pixels only, which drops all metadata.
    plain = Image.frombytes(mode, image.size, image.convert(mode).tobytes())
    info = PngInfo()
    for keyword, text in (texts or {}).items():
        # `add_text` takes the international form only for texts that are not Latin-1; XMP has no other.
        (info.add_itxt if keyword.startswith("XML:") else info.add_text)(keyword, text)
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=6, optimize=False, pnginfo=info)
    return buffer.getvalue()


def _decode(file: BinaryIO, name: str, max_pixels: int, background: Color) -> tuple[Image.Image, Image.Image | None]:
    try:
        with open_pillow(file) as image:
            _check(image, name, max_pixels)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright, name, background)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"has more than {max_pixels:,} pixels", where=name, remedy="make it smaller") from None
    except UnidentifiedImageError:
        raise _explain_unreadable(file, name) from None
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
    # A JPEG or HEIC from a phone may contain further images, which are no animation.
    if image.format not in {"JPEG", "MPO", "HEIF"} and (frames := getattr(image, "n_frames", 1)) > 1:
        problem = f"has {frames} pages" if image.format == "TIFF" else "is animated"
        raise DataError(problem, where=name, allowed="still images", remedy="save one of them as a still image")
    if image.mode == "F":
        raise DataError("has floating-point values", where=name, allowed="8 or 16 bits", remedy="save it with 16 bits")


def _to_rgb(image: Image.Image, name: str, background: Color) -> tuple[Image.Image, Image.Image | None]:
    """Returns the image in sRGB over the background, and its opacity unless that is full."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        gray = Image.new("L", image.size)
        for top in range(0, image.height, _ROWS):
            rows = np.rint(values[top : top + _ROWS].astype(np.float64) * (255.0 / 65535.0))
            gray.paste(Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8)), (0, top))
        rgb, transparent = gray.convert("RGB"), image.info.get("transparency")
        if not isinstance(transparent, int):
            return rgb, None
        opacity = Image.fromarray(((values != transparent) * 255).astype(np.uint8))
        return Image.composite(rgb, Image.new("RGB", image.size, background), opacity), _unless_full(opacity)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        opaque = Image.alpha_composite(canvas, rgba).convert("RGB")
        opaque.info["icc_profile"] = image.info.get("icc_profile")
        return to_srgb(opaque, name), _unless_full(rgba.getchannel("A"))
    return to_srgb(image if image.mode in {"RGB", "CMYK"} else image.convert("RGB"), name), None


def _unless_full(opacity: Image.Image) -> Image.Image | None:
    return opacity if opacity.getextrema()[0] != 255 else None
