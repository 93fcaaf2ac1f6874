"""Finds metadata which shows that an image was generated. Records its kind, never its content.

A file without such metadata proves nothing: many programs remove metadata or write none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from lora_engine.data.containers import read_c2pa, read_png_texts
from lora_engine.data.folder import open_inside
from lora_engine.data.images import BROKEN, open_pillow
from lora_engine.data.rights import MANIFEST, GenerationSign

_EXIF, _USER_COMMENT, _MAKE, _MODEL = 0x8769, 0x9286, 0x010F, 0x0110
# IPTC's vocabulary http://cv.iptc.org/newscodes/digitalsourcetype/, as an element or an attribute of XMP. Searched as
# bytes: an XML parser would add attack surface.
_SOURCE_TYPE = re.compile(
    rb"[Dd]igital[Ss]ource[Tt]ype.{0,200}?(compositeWithTrained|trained)AlgorithmicMedia", re.DOTALL
)
_SOURCE_TYPES: Mapping[bytes, GenerationSign] = {
    b"trained": "digital-source-type-trained-algorithmic-media",
    b"compositeWithTrained": "digital-source-type-composite-with-trained-algorithmic-media",
}
_GENERATED_MEDIA = re.compile(rb"digitalsourcetype/(compositeWithT|t)rainedAlgorithmicMedia")
# Keys of InvokeAI's texts: releases from 3 on, 2, and 1.
_INVOKEAI = ("invokeai_metadata", "invokeai_graph", "sd-metadata", "Dream")


def read_evidence(
    path: Path, root: Path, *, verifies: bool = False, roots: Path | None = None
) -> tuple[GenerationSign, ...]:
    """Returns the evidence in an image file, sorted; decodes no pixels.

    Recognizes the text of AUTOMATIC1111's web interface (`parameters`, or the EXIF comment of other formats), the two
    texts of ComfyUI (`prompt`, `workflow`; in WebP in EXIF), those of InvokeAI and NovelAI, IPTC's digital source type
    in XMP, and a C2PA manifest. Cameras write C2PA manifests, too: only one that names a generated source is evidence
    of generation.

    Args:
        path: A file that `open_image` accepts.
        root: Links that lead out of this folder are refused.
        verifies: True verifies the signature of a C2PA manifest; see `verify_credentials`.
        roots: Certificates that such a signature is trusted by; None trusts none.

    Raises:
        DataError: The file cannot be opened.
    """
    with open_inside(path, root) as file:
        manifest = read_c2pa(file)
        signs = {*_find_in_c2pa(manifest), *_find_in_texts(dict(read_png_texts(file)))}
        if manifest and verifies:
            from lora_engine.data.credentials import verify_credentials  # loads a library of 50 MB

            signs.add(verify_credentials(file, roots))
        file.seek(0)
        try:
            with open_pillow(file) as image:
                signs.update(_find_in_image(image))
        except (*BROKEN, Image.DecompressionBombError, Image.DecompressionBombWarning):
            pass
    return tuple(sorted(signs))


def _find_in_texts(texts: Mapping[str, str]) -> Iterator[GenerationSign]:
    if texts.get("parameters"):
        yield "a1111-parameters"
    if '"class_type"' in texts.get("prompt", ""):
        yield "comfyui-prompt"
    if '"nodes"' in texts.get("workflow", ""):
        yield "comfyui-workflow"
    if any(texts.get(key) for key in _INVOKEAI):
        yield "invokeai-metadata"
    if texts.get("Software") == "NovelAI":
        yield "novelai-metadata"
    yield from _find_source_type(texts.get("XML:com.adobe.xmp", "").encode())


def _find_in_image(image: Image.Image) -> Iterator[GenerationSign]:
    exif = image.getexif()
    comment = exif.get_ifd(_EXIF).get(_USER_COMMENT)
    # UTF-16 of either byte order; without the zero bytes the ASCII text is searchable.
    if isinstance(comment, bytes) and b"Steps: " in comment.replace(b"\0", b""):
        yield "a1111-parameters"
    # ComfyUI writes `prompt:{...}` and `workflow:{...}` into EXIF texts, as WebP has no others.
    texts = [_text(exif.get(tag)).partition(":") for tag in (_MAKE, _MODEL)]
    yield from _find_in_texts({key: text for key, _, text in texts if key in {"prompt", "workflow"}})
    yield from _find_source_type(_bytes(image.info.get("xmp")))


def _find_in_c2pa(manifest: bytes) -> Iterator[GenerationSign]:
    if manifest:
        yield MANIFEST
    if _GENERATED_MEDIA.search(manifest):
        yield "c2pa-trained-algorithmic-media"


def _find_source_type(xmp: bytes) -> Iterator[GenerationSign]:
    for match in _SOURCE_TYPE.finditer(xmp):
        yield _SOURCE_TYPES[match[1]]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace") if isinstance(value, str) else b""
