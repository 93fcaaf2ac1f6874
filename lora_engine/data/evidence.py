"""Finds metadata which shows that an image was generated. Records its kind, never its content.

A file without such metadata proves nothing: many programs remove metadata or write none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lora_engine.data.folder import open_inside
from lora_engine.data.images import BROKEN, open_pillow

if TYPE_CHECKING:
    from lora_engine.data.rights import GenerationSign

_EXIF, _USER_COMMENT = 0x8769, 0x9286
# IPTC's vocabulary http://cv.iptc.org/newscodes/digitalsourcetype/, as an element or an attribute of XMP. Searched as
# bytes: an XML parser would add attack surface.
_SOURCE_TYPE = re.compile(
    rb"[Dd]igital[Ss]ource[Tt]ype.{0,200}?(compositeWithTrained|trained)AlgorithmicMedia", re.DOTALL
)
_SOURCE_TYPES: Mapping[bytes, GenerationSign] = {
    b"trained": "digital-source-type-trained-algorithmic-media",
    b"compositeWithTrained": "digital-source-type-composite-with-trained-algorithmic-media",
}


def read_evidence(path: Path, root: Path) -> tuple[GenerationSign, ...]:
    """Returns the evidence in an image file, sorted; decodes no pixels.

    Recognizes the text of AUTOMATIC1111's web interface (`parameters`, or the EXIF comment of a JPEG), the two texts of
    ComfyUI (`prompt`, `workflow`), and IPTC's digital source type in XMP.

    Args:
        path: A file that `open_image` accepts.
        root: Links that lead out of this folder are refused.

    Raises:
        DataError: The file cannot be opened.
    """
    with open_inside(path, root) as file:
        try:
            with open_pillow(file) as image:
                return tuple(sorted(set(_find_evidence(image))))
        except BROKEN:
            return ()


def _find_evidence(image: Image.Image) -> Iterator[GenerationSign]:
    info: Mapping[Any, Any] = image.info
    if _text(info.get("parameters")):
        yield "a1111-parameters"
    if '"class_type"' in _text(info.get("prompt")):
        yield "comfyui-prompt"
    if '"nodes"' in _text(info.get("workflow")):
        yield "comfyui-workflow"
    comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    # UTF-16 of either byte order; without the zero bytes the ASCII text is searchable.
    if isinstance(comment, bytes) and b"Steps: " in comment.replace(b"\0", b""):
        yield "a1111-parameters"
    for name in ("xmp", "XML:com.adobe.xmp"):
        for match in _SOURCE_TYPE.finditer(_bytes(info.get(name))):
            yield _SOURCE_TYPES[match[1]]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace") if isinstance(value, str) else b""
