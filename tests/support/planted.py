"""Image files of all formats with a marker in every place that their formats have for metadata."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

MARKER = "PLANTED-7f3a"
"""In every text of the files."""
_XMP = (
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    f'<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:creator>{MARKER} xmp</dc:creator>'
    f"</rdf:Description></rdf:RDF></x:xmpmeta>"
).encode()


def plant(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files; each shows other noise."""
    planters = {"a.png": _png, "b.jpg": _jpeg, "c.webp": _webp, "d.avif": _avif, "e.tiff": _tiff, "f.gif": _gif}
    for number, (name, planter) in enumerate(planters.items()):
        yield name, planter(_noise(seed + number))
    yield "g.bmp", _saved(_noise(seed + 6), "BMP") + MARKER.encode()
    thumbnail = _segment(0xE1, _exif_with_thumbnail())
    plain = _saved(_noise(seed + 7), "JPEG")
    yield "h.jpg", plain[:2] + thumbnail + plain[2:]


def marks(content: bytes) -> int:
    """Returns how often the marker is in a file, as text of one or two bytes per character."""
    return sum(content.count(MARKER.encode(encoding)) for encoding in ("utf-8", "utf-16-le", "utf-16-be"))


def chunks_of_png(content: bytes) -> list[bytes]:
    """Returns the kinds of the chunks of a PNG."""
    position, kinds = 8, []
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        kinds.append(kind)
        position += 12 + length
    return kinds


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    name = "sRGB built-in".encode("utf-16-be")
    assert name in profile
    return profile.replace(name, MARKER.ljust(13).encode("utf-16-be"))


def _exif() -> Image.Exif:
    exif = Image.Exif()
    for tag in (ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Artist, ExifTags.Base.Copyright):
        exif[tag] = f"{MARKER} {tag.name}"
    exif[ExifTags.Base.XPAuthor] = f"{MARKER} author".encode("utf-16-le")
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.MakerNote] = f"{MARKER} maker note".encode()
    details[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + f"{MARKER} Steps: 20".encode()
    details[ExifTags.Base.BodySerialNumber] = f"{MARKER} serial"
    place = exif.get_ifd(ExifTags.IFD.GPSInfo)
    place[ExifTags.GPS.GPSLatitudeRef], place[ExifTags.GPS.GPSLatitude] = "N", (52.0, 31.0, 12.25)
    place[ExifTags.GPS.GPSAreaInformation] = b"ASCII\0\0\0" + f"{MARKER} gps".encode()
    return exif


def _exif_with_thumbnail() -> bytes:
    """Returns EXIF data whose second directory has a thumbnail, which Pillow cannot write."""
    thumbnail = _saved(_noise(99).resize((16, 12)), "JPEG", comment=f"{MARKER} thumbnail")
    first = struct.pack("<HHHIII", 1, 0x0112, 3, 1, 1, 26)
    offset = 26 + 2 + 24 + 4
    entries = struct.pack("<HHII", 0x0201, 4, 1, offset) + struct.pack("<HHII", 0x0202, 4, 1, len(thumbnail))
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + struct.pack("<H", 2) + entries + bytes(4) + thumbnail


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(image: Image.Image) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{MARKER} Steps: 20")
    info.add_text("Comment", f"{MARKER} compressed", zip=True)
    info.add_itxt("XML:com.adobe.xmp", _XMP.decode())
    plain = _saved(image, "PNG", pnginfo=info, exif=_exif(), icc_profile=_profile())
    end = plain.rindex(b"IEND") - 4
    late = _chunk(b"tEXt", b"Author\0" + MARKER.encode()) + _chunk(b"prVt", MARKER.encode())
    return plain[:end] + late + plain[end:] + MARKER.encode()


def _segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def _jpeg(image: Image.Image) -> bytes:
    plain = _saved(image, "JPEG", exif=_exif(), xmp=_XMP, comment=f"{MARKER} comment", icc_profile=_profile())
    iptc = b"\x1c\x02\x50" + struct.pack(">H", len(MARKER)) + MARKER.encode()
    photoshop = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc
    extended = b"http://ns.adobe.com/xmp/extension/\0" + bytes(40) + MARKER.encode()
    jumbf = b"JP\0\1\0\0\0\1" + struct.pack(">I4s", 8 + len(MARKER), b"jumb") + MARKER.encode()
    added = [(0xED, photoshop), (0xE1, extended), (0xEB, jumbf), (0xEF, MARKER.encode())]
    return plain[:2] + b"".join(_segment(*part) for part in added) + plain[2:] + MARKER.encode()


def _webp(image: Image.Image) -> bytes:
    plain = _saved(image, "WEBP", exif=_exif().tobytes(), xmp=_XMP, icc_profile=_profile())
    content = plain[8:] + b"MARK" + struct.pack("<I", len(MARKER)) + MARKER.encode()
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _avif(image: Image.Image) -> bytes:
    plain = _saved(image, "AVIF", exif=_exif().tobytes(), xmp=_XMP, icc_profile=_profile())
    return plain + struct.pack(">I4s16s", 24 + len(MARKER), b"uuid", bytes(16)) + MARKER.encode()


def _tiff(image: Image.Image) -> bytes:
    texts = dict.fromkeys((270, 315, 33432, 65000), f"{MARKER} tag")
    raw = {700: _XMP, 33723: MARKER.encode(), 34377: MARKER.encode()}
    return _saved(image, "TIFF", exif=_exif(), tiffinfo=texts | raw, icc_profile=_profile()) + MARKER.encode()


def _gif(image: Image.Image) -> bytes:
    return _saved(image, "GIF", comment=f"{MARKER} comment".encode()) + MARKER.encode()
