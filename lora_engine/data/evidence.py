"""Signs that a picture was generated, as its own file carries them. The signs are named; what they say is never kept.

A file without signs proves nothing: programs drop metadata, and most cameras and painters write none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lora_engine.data.images import BROKEN, FORMATS, open_regular
from lora_engine.data.rights import Evidence

_EXIF, _USER_COMMENT = 0x8769, 0x9286
# IPTC's vocabulary http://cv.iptc.org/newscodes/digitalsourcetype/, as an element or an attribute of XMP. Searched as
# bytes: a parser of XML would be one more thing to attack.
_SOURCE_TYPE = re.compile(
    rb"[Dd]igital[Ss]ource[Tt]ype.{0,200}?(compositeWithTrained|trained)AlgorithmicMedia", re.DOTALL
)
_SOURCE_TYPES: Mapping[bytes, Evidence] = {
    b"trained": "digital-source-type-trained-algorithmic-media",
    b"compositeWithTrained": "digital-source-type-composite-with-trained-algorithmic-media",
}


def read_evidence(path: Path, root: Path) -> tuple[Evidence, ...]:
    """The signs in a picture file, sorted; the pixels are not decoded.

    Seen are the text that AUTOMATIC1111's web interface writes (`parameters`, or the EXIF comment of a JPEG), the two
    that ComfyUI writes (`prompt`, `workflow`), and the digital source type of IPTC in XMP.

    Args:
        path: A file that `open_image` takes.
        root: A link that leads out of this folder is refused.

    Raises:
        DataError: The file cannot be opened.
    """
    with open_regular(path, root) as file:
        try:
            with Image.open(file, formats=FORMATS) as picture:
                return tuple(sorted(set(_signs(picture))))
        except BROKEN:
            return ()


def _signs(picture: Image.Image) -> Iterator[Evidence]:
    info: Mapping[Any, Any] = picture.info
    if _text(info.get("parameters")):
        yield "a1111-parameters"
    if '"class_type"' in _text(info.get("prompt")):
        yield "comfyui-prompt"
    if '"nodes"' in _text(info.get("workflow")):
        yield "comfyui-workflow"
    comment = picture.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    # EXIF's own UTF-16 in either order; without its zeros the words are plain.
    if isinstance(comment, bytes) and b"Steps: " in comment.replace(b"\0", b""):
        yield "a1111-parameters"
    for name in ("xmp", "XML:com.adobe.xmp"):
        for match in _SOURCE_TYPE.finditer(_bytes(info.get(name))):
            yield _SOURCE_TYPES[match[1]]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace") if isinstance(value, str) else b""
