"""Reads the metadata blocks of PNG, JPEG, WebP and AVIF files, of which Pillow hides some; decodes no pixels."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

MAX_TEXT = 1 << 20
_MAX_BLOCKS, _MAX_BLOCK, _MAX_BYTES = 4_096, 8 << 20, 16 << 20
"""Bounds of a file: blocks, bytes read of each, and of all of them."""
_PNG = b"\x89PNG\r\n\x1a\n"
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
_SEGMENTS, _SCAN = {0xE1: "APP1", 0xEB: "APP11"}, 0xDA
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PIXELS = {"IHDR", "PLTE", "IDAT", "IEND", "VP8 ", "VP8L", "ALPH", "mdat"}
_Header = tuple[str, int]
"""Kind of a block, and the number of bytes that follow."""


def read_png_texts(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yields key and text of each text block of a PNG, also after the pixels, where Pillow does not look."""
    for kind, data in _blocks(file):
        key, _, rest = data.partition(b"\0")
        with suppress(zlib.error, UnicodeDecodeError):
            if kind == "tEXt":
                yield key.decode("latin-1"), rest.decode("latin-1")
            elif kind == "zTXt":
                yield key.decode("latin-1"), _inflate(rest[1:]).decode("latin-1")
            elif kind == "iTXt" and len(rest) > 1:
                text = rest[2:].split(b"\0", 2)[-1]
                yield key.decode("latin-1"), (_inflate(text) if rest[0] else text).decode("utf-8")


def read_xmp(file: BinaryIO) -> bytes:
    """Returns the XMP packet of a JPEG or WebP, empty if there is none; that of a PNG is among its texts."""
    for kind, data in _blocks(file):
        if kind == "XMP ":
            return data
        if kind == "APP1" and data.startswith(_JPEG_XMP):
            return data[len(_JPEG_XMP) :]
    return b""


def read_c2pa(file: BinaryIO) -> bytes:
    """Returns the C2PA manifest store of a file (JUMBF boxes), as the C2PA specification embeds it; empty if none."""
    found = b""
    for kind, data in _blocks(file):
        if kind in {"caBX", "C2PA"}:
            found += data
        elif kind == "uuid" and data[:16] == _C2PA_UUID:
            found += data[16:]
        elif kind == "APP11" and data[:2] == b"JP":
            # Each segment repeats length and type of the box, of which the first segment's are part of the content.
            found += data[16:] if found else data[8:]
    return found if b"c2pa" in found else b""


def media_type(file: BinaryIO) -> str:
    """Returns the media type of a PNG, WebP, JPEG, AVIF or HEIC file, such as `image/png`."""
    file.seek(0)
    start = file.read(12)
    if start[:8] == _PNG:
        return "image/png"
    if start[:4] == b"RIFF":
        return "image/webp"
    if start[4:8] == b"ftyp":
        return "image/avif" if start[8:12] in {b"avif", b"avis"} else "image/heic"
    return "image/jpeg"


def _inflate(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, MAX_TEXT)


def _blocks(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yields kind and content of the blocks of a file that have no pixels; nothing of other formats."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(12)
    if start[:8] == _PNG:
        position, read, trailer = 8, _png_header, 4
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        position, read, trailer = 12, _riff_header, 0
    elif start[:2] == b"\xff\xd8":
        position, read, trailer = 2, _jpeg_header, 0
    elif start[4:8] == b"ftyp":
        position, read, trailer = 0, _box_header, 0
    else:
        return
    budget = _MAX_BYTES
    for _ in range(_MAX_BLOCKS):
        file.seek(position)
        header = read(file)
        if header is None or budget <= 0:
            return
        kind, length = header
        length = size - file.tell() if length < 0 else length
        position = file.tell() + length + trailer
        if kind == "SOS" or position > size + 1:
            return
        if kind not in _PIXELS:
            data = file.read(min(length, _MAX_BLOCK, budget))
            budget -= len(data)
            yield kind, data
        if read is _riff_header:
            position += length % 2


def _png_header(file: BinaryIO) -> _Header | None:
    header = file.read(8)
    return (header[4:].decode("latin-1"), int.from_bytes(header[:4])) if len(header) == 8 else None


def _riff_header(file: BinaryIO) -> _Header | None:
    header = file.read(8)
    return (header[:4].decode("latin-1"), int.from_bytes(header[4:], "little")) if len(header) == 8 else None


def _jpeg_header(file: BinaryIO) -> _Header | None:
    marker = file.read(2)
    while marker == b"\xff\xff":
        marker = b"\xff" + file.read(1)
    if len(marker) < 2 or marker[0] != 0xFF:
        return None
    if marker[1] == _SCAN:
        return "SOS", 0
    if marker[1] == 0x01 or 0xD0 <= marker[1] <= 0xD9:
        return "", 0
    length = int.from_bytes(file.read(2))
    return (_SEGMENTS.get(marker[1], ""), length - 2) if length >= 2 else None


def _box_header(file: BinaryIO) -> _Header | None:
    header = file.read(8)
    if len(header) < 8:
        return None
    length, kind = struct.unpack(">I4s", header)
    if length == 1:
        length = int.from_bytes(file.read(8)) - 8
    # Zero means that the box reaches to the end of the file.
    rest = length - 8 if length else -1
    return (kind.decode("latin-1"), rest) if rest >= 0 or not length else None
