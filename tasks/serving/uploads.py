"""Takes images that requests contain: decodes them within limits, and keeps the files of a job until it has ended."""

from __future__ import annotations

import base64
import binascii
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.data.images import encode_png, open_with_alpha, write_image, write_mask
from lora_engine.errors import DataError
from registry.errors import disk_errors
from registry.store.snapshot import find_scratch

if TYPE_CHECKING:
    from PIL import Image

    from lora_engine.inference.inpainting import PreparedImage

MAX_UPLOAD_BYTES = 32 << 20
MAX_UPLOAD_PIXELS = 4096 * 4096
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,20};base64,", re.IGNORECASE)
_ALLOWED = "base64 of an image, with or without `data:image/png;base64,` before it"


@dataclass(frozen=True)
class UploadedImage:
    """An image of a request.

    Attributes:
        pixels: The image over white, RGB.
        opacity: How opaque it is, gray; None if it is opaque everywhere.
    """

    pixels: Image.Image
    opacity: Image.Image | None


def decode_base64(text: str, where: str) -> bytes:
    """Returns the bytes of an image in base64; a URL or a path is refused, so that no request reads or fetches a file.

    Args:
        text: Base64, with or without the prefix of a data URL.
        where: The field, for errors.

    Raises:
        DataError: It is something else, or too large.
    """
    match = _DATA_URL.match(text)
    content = text[match.end() :] if match else text
    if len(content) > MAX_UPLOAD_BYTES * 4 // 3 + 4:
        raise DataError("the image is too large", where=where, allowed=f"at most {MAX_UPLOAD_BYTES:,} bytes")
    try:
        data = base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"the image is {text[:40]!r}", where=where, allowed=_ALLOWED) from None
    if not data:
        raise DataError("the image is empty", where=where, allowed=_ALLOWED)
    return data


@contextmanager
def upload_file(data: bytes, where: str) -> Iterator[Path]:
    """Yields a temporary file of an upload, and names the field in errors of reading it.

    Args:
        data: The bytes of the file.
        where: The field, for errors.

    Raises:
        DataError: It is too large.
    """
    if len(data) > MAX_UPLOAD_BYTES:
        raise DataError("the image is too large", where=where, allowed=f"at most {MAX_UPLOAD_BYTES:,} bytes")
    with tempfile.TemporaryDirectory(dir=find_scratch()) as folder:
        file = Path(folder) / "image"
        with disk_errors(file):
            file.write_bytes(data)
        try:
            yield file
        except DataError as error:
            raise error.at(where) from None


def read_upload(data: bytes, where: str) -> UploadedImage:
    """Returns the image of a file's bytes.

    Args:
        data: The bytes of the file.
        where: The field, for errors.

    Raises:
        DataError: It is no image of an allowed format, or too large.
    """
    with upload_file(data, where) as file:
        _, pixels, opacity = open_with_alpha(file, MAX_UPLOAD_PIXELS)
    return UploadedImage(pixels, opacity)


@dataclass(frozen=True)
class SourceFiles:
    """The files of an image to start from and of its mask, for one job.

    Attributes:
        image: The image.
        mask: Its mask; None draws all.
    """

    image: Path
    mask: Path | None

    @classmethod
    def write(cls, prepared: PreparedImage) -> SourceFiles:
        """Writes the files into a new temporary folder."""
        folder = Path(tempfile.mkdtemp(dir=find_scratch()))
        files = cls(folder / "image.png", None if prepared.mask is None else folder / "mask.png")
        write_image(files.image, prepared.image)
        if prepared.mask is not None and files.mask is not None:
            write_mask(files.mask, prepared.mask)
        return files

    def delete(self) -> None:
        """Deletes the files; deletes nothing twice."""
        shutil.rmtree(self.image.parent, ignore_errors=True)


def restore_png(data: bytes, prepared: PreparedImage) -> bytes:
    """Returns a drawn PNG pasted into the original image, with the same texts; unchanged if all was drawn.

    Args:
        data: The PNG that the engine wrote.
        prepared: The image and mask that it was drawn from.
    """
    from PIL import Image

    from lora_engine.data.containers import read_png_texts

    if prepared.region is None:
        return data
    with Image.open(io.BytesIO(data)) as drawn:
        restored = prepared.restore(drawn)
    return encode_png(restored, dict(read_png_texts(io.BytesIO(data))))
