"""Writes generated images as PNG, WebP or JPEG with their metadata, and reads from them which adapters they used.

A1111's infotext is where A1111 and Civitai read it: the text `parameters` of a PNG, the EXIF comment of others. The
JSON is the text `loraline` of a PNG, and a property of the XMP packet of others.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, unescape

from PIL import Image

from lora_engine.data.containers import read_png_texts, read_xmp
from lora_engine.data.folder import open_inside
from lora_engine.data.images import encode_png, open_pillow
from lora_engine.documents import parse_json
from lora_engine.errors import DataError, SettingsError
from lora_engine.inference import ImageFormat
from lora_engine.inference.image_metadata import Drawing, source_type_of

if TYPE_CHECKING:
    from lora_engine.inference.content_credentials import Credentials

CHUNK, XMP = "loraline", "XML:com.adobe.xmp"
MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
_MAX_SEGMENT = 65_000
"""Bytes of the EXIF or XMP of a JPEG; a segment holds 65 533, from which headers are subtracted."""
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PROPERTY = (b"<loraline:generation>", b"</loraline:generation>")
# The packet of Adobe's XMP specification, part 1, section 7.3; the first property is of IPTC's Extension schema.
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"{namespace}><Iptc4xmpExt:DigitalSourceType>'
    "{source_type}</Iptc4xmpExt:DigitalSourceType>{properties}</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
)
_SOURCE_TYPE = re.compile(r"/digitalsourcetype/([A-Za-z]{1,60})<")
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


@dataclass(frozen=True)
class ImageOptions:
    """How images are written.

    Attributes:
        format: `png`, `webp` or `jpeg`.
        quality: 1 to 100, of JPEG and WebP; a WebP of 100 is lossless.
        credentials: Certificate and key to sign with; None does not sign.
    """

    format: ImageFormat = "png"
    quality: int = 90
    credentials: Credentials | None = None

    def __post_init__(self) -> None:
        if self.format not in MEDIA_TYPES:
            raise SettingsError(f"unknown image format {self.format!r}", allowed=", ".join(MEDIA_TYPES))
        if not 1 <= self.quality <= 100:
            raise SettingsError(f"quality is {self.quality}", allowed="1 to 100")

    @property
    def suffix(self) -> str:
        """The suffix of a file's name."""
        return ".jpg" if self.format == "jpeg" else f".{self.format}"


PNG = ImageOptions()


def encode_image(image: Image.Image, drawing: Drawing, seed: int, options: ImageOptions = PNG) -> bytes:
    """Returns an image file with its metadata; the same arguments give the same bytes unless it is signed.

    Args:
        image: The image, RGB.
        drawing: How it was generated.
        seed: Its seed.
        options: Format, quality and signature.

    Raises:
        DataError: The metadata is too long for a JPEG.
        SettingsError: The extra `c2pa` is not installed.
    """
    size = (image.height, image.width)
    content = _encode_texts(image, png_texts(drawing, seed, size), drawing.source_type, options)
    if options.credentials is None:
        return content
    return options.credentials.sign(content, MEDIA_TYPES[options.format], drawing, seed, size)


def convert_png(content: bytes, options: ImageOptions) -> bytes:
    """Returns a PNG of `encode_image` or `encode_marked` in another format, with its metadata; equals `encode_image`.

    Args:
        content: The PNG; not signed.
        options: Format and quality; a PNG is returned as it is.

    Raises:
        DataError: The metadata is too long for a JPEG.
        SettingsError: The image is to be signed.
    """
    if options.credentials is not None:
        raise SettingsError("a stored image is not signed", remedy="sign it when it is drawn")
    if options.format == "png":
        return content
    texts = dict(read_png_texts(io.BytesIO(content)))
    match = _SOURCE_TYPE.search(texts.get(XMP, ""))
    with open_pillow(io.BytesIO(content)) as image:
        return _encode_texts(image.convert("RGB"), texts, match[1] if match else source_type_of(False), options)


def png_texts(drawing: Drawing, seed: int, size: tuple[int, int]) -> dict[str, str]:
    """Returns the texts of a PNG by keyword; see `Drawing.facts` for the arguments."""
    facts = drawing.facts(seed, size)
    return {
        "parameters": drawing.infotext(seed, size),
        CHUNK: json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":")),
        XMP: _packet(drawing.source_type, None),
    }


def encode_marked(image: Image.Image, source_type: str) -> bytes:
    """Returns an image, such as an unfinished one or a sheet, as PNG whose only metadata is IPTC's source type."""
    return encode_png(image, {XMP: _packet(source_type, None)})


def read_used_adapters(path: Path) -> dict[str, str] | None:
    """Returns reference -> SHA-256 of the adapters that a PNG, WebP or JPEG says it was generated with.

    None means that it says nothing, as do images of other programs.

    Raises:
        DataError: The JSON is not as this module writes it.
    """
    with open_inside(path, path.parent) as file:
        text = dict(read_png_texts(file)).get(CHUNK)
        if text is None:
            first, last = _PROPERTY
            content, is_closed, _ = read_xmp(file).partition(first)[2].partition(last)
            text = unescape(content.decode("utf-8", "replace")) if is_closed else None
    if text is None:
        return None
    facts = parse_json(text, f"{path}, metadata {CHUNK!r}", DataError)
    entries = facts.get("adapters") if isinstance(facts, dict) else None
    used: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        reference, sha256 = (entry.get(key) for key in ("reference", "sha256")) if isinstance(entry, dict) else (0, 0)
        if not isinstance(reference, str) or not isinstance(sha256, str) or not _DIGEST.fullmatch(sha256):
            raise DataError(f"the metadata {CHUNK!r} names no adapters as Loraline does", where=str(path))
        used[reference] = sha256
    return used


def _packet(source_type: str, generation: str | None) -> str:
    properties = "" if generation is None else f"<loraline:generation>{escape(generation)}</loraline:generation>"
    return _PACKET.format(
        namespace=' xmlns:loraline="urn:loraline:generation"' if properties else "",
        source_type=f"{SOURCE_TYPES}{source_type}",
        properties=properties,
    )


def _encode_texts(image: Image.Image, texts: Mapping[str, str], source_type: str, options: ImageOptions) -> bytes:
    if options.format == "png":
        return encode_png(image, texts)
    return _encode_with_exif(image, texts.get("parameters", ""), _packet(source_type, texts.get(CHUNK)), options)


def _encode_with_exif(image: Image.Image, infotext: str, packet: str, options: ImageOptions) -> bytes:
    exif, xmp = Image.Exif(), packet.encode()
    if infotext:
        exif[_EXIF_IFD] = {_USER_COMMENT: b"UNICODE\0" + infotext.encode("utf-16-be")}
    comment = exif.tobytes()
    if options.format == "jpeg" and (longest := max(len(comment), len(xmp))) > _MAX_SEGMENT:
        raise DataError(
            f"the metadata of the image has {longest:,} bytes",
            allowed=f"at most {_MAX_SEGMENT:,} in a JPEG",
            remedy="write PNG or WebP, or shorten the prompt",
        )
    settings = (
        {"subsampling": 0, "optimize": True}
        if options.format == "jpeg"
        else {"lossless": options.quality == 100, "method": 4}
    )
    plain = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    buffer = io.BytesIO()
    plain.save(buffer, options.format, quality=options.quality, exif=comment, xmp=xmp, **settings)
    return buffer.getvalue()
