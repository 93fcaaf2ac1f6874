"""Evidence of generation in image files: what each program writes, and C2PA manifests in every container."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from lora_engine.data.containers import read_c2pa
from lora_engine.data.evidence import read_evidence
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from tests.lora_engine.data.conftest import make_image

SIGNED = Path(__file__).with_name("c2pa")
"""Images that `c2pa-python` 0.38.1 signed, with the digital source type of a generated and of a captured image."""
TRAINED = "digital-source-type-trained-algorithmic-media"
SOURCE = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description Iptc4xmpExt:DigitalSourceType='
    b'"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)


def png(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key.replace("_", "-") if key == "sd_metadata" else key, text)
    return saved("PNG", pnginfo=info)


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    make_image().save(buffer, kind, **options)
    return buffer.getvalue()


def comfyui_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010F] = 'workflow:{"nodes": []}'
    exif[0x0110] = 'prompt:{"3": {"class_type": "KSampler"}}'
    return exif.tobytes()


def after_the_pixels(kind: bytes, data: bytes) -> bytes:
    plain = saved("PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return plain[:-12] + chunk + plain[-12:]


WRITTEN: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "invokeai 3": (lambda: png(invokeai_metadata='{"model": {}}'), ("invokeai-metadata",)),
    "invokeai 2": (lambda: png(sd_metadata='{"model": "stable diffusion"}'), ("invokeai-metadata",)),
    "invokeai 1": (lambda: png(Dream='"a cat" -s 50'), ("invokeai-metadata",)),
    "novelai": (lambda: png(Software="NovelAI", Title="AI generated image"), ("novelai-metadata",)),
    "gimp": (lambda: png(Software="GIMP", Title="my cat"), ()),
    "comfyui in webp": (lambda: saved("WEBP", exif=comfyui_exif()), ("comfyui-prompt", "comfyui-workflow")),
    "late text": (lambda: after_the_pixels(b"tEXt", b"parameters\0a cat"), ("a1111-parameters",)),
    "late compressed": (
        lambda: after_the_pixels(b"zTXt", b"parameters\0\0" + zlib.compress(b"a cat")),
        ("a1111-parameters",),
    ),
    "late xmp": (lambda: after_the_pixels(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + SOURCE), (TRAINED,)),
    "xmp in png": (lambda: after_the_pixels(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0digitalCapture"), ()),
    "xmp in jpeg": (lambda: saved("JPEG", xmp=SOURCE), (TRAINED,)),
    "xmp in webp": (lambda: saved("WEBP", xmp=SOURCE), (TRAINED,)),
    "xmp in avif": (lambda: saved("AVIF", xmp=SOURCE), (TRAINED,)),
    "xmp in tiff": (lambda: saved("TIFF", tiffinfo={700: SOURCE}), (TRAINED,)),
    "bomb": (
        lambda: after_the_pixels(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(1 << 26))),
        ("a1111-parameters",),
    ),
    "broken text": (lambda: after_the_pixels(b"zTXt", b"parameters\0\0 no zlib"), ()),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_program_writes_is_found(tmp_path: Path, name: str) -> None:
    make, signs = WRITTEN[name]
    path = tmp_path / "image"
    path.write_bytes(make())
    assert read_evidence(path, tmp_path) == signs


def in_png(store: bytes) -> bytes:
    return after_the_pixels(b"caBX", store)


def in_webp(store: bytes) -> bytes:
    content = saved("WEBP")[8:] + b"C2PA" + struct.pack("<I", len(store)) + store + bytes(len(store) % 2)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def in_jpeg(store: bytes) -> bytes:
    """Splits the store over several segments, each with length and type of the box, so that words are cut."""
    plain, box, step = saved("JPEG"), store[:8], 500
    parts = [store[start : start + step] for start in range(8, len(store), step)]
    segments = [b"JP" + struct.pack(">HI", 1, number) + box + part for number, part in enumerate(parts, start=1)]
    joined = b"".join(b"\xff\xeb" + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
    return plain[:2] + joined + plain[2:]


@pytest.mark.parametrize("embed", [None, in_png, in_webp, in_jpeg])
def test_a_c2pa_manifest_is_found_and_counts_if_it_names_a_generated_source(
    tmp_path: Path, embed: Callable[[bytes], bytes] | None
) -> None:
    found = {}
    for name in ("generated", "captured"):
        content = (SIGNED / f"{name}.avif").read_bytes()
        if embed is not None:
            store = read_c2pa(io.BytesIO(content))
            content = embed(store[store.index(b"jumb") - 4 :])
        path = tmp_path / name
        path.write_bytes(content)
        found[name] = read_evidence(path, tmp_path)
    assert found == {
        "generated": ("c2pa-manifest", "c2pa-trained-algorithmic-media"),
        "captured": ("c2pa-manifest",),
    }


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
def test_cut_and_changed_files_end_with_signs_or_none(tmp_path: Path, kind: str) -> None:
    content = saved(kind, **({} if kind == "TIFF" else {"exif": comfyui_exif()}))
    path = tmp_path / "image"
    for cut in range(0, len(content), max(1, len(content) // 50)):
        for changed in (content[:cut], content[:cut] + b"\xff\xff\xff\xff" + content[cut + 4 :]):
            path.write_bytes(changed)
            assert {*read_evidence(path, tmp_path)} <= {"comfyui-prompt", "comfyui-workflow"}


def test_generated_images_are_allowed_named_or_refused(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "made.png").write_bytes(png(parameters="a cat"))
    (images / "signed.avif").write_bytes((SIGNED / "captured.avif").read_bytes())
    make_image(seed=3).save(images / "stated.png")
    make_image(seed=4).save(images / "plain.png")
    consent = tmp_path / "consent.csv"
    consent.write_text("file,ai_generated\nstated.png,yes\nplain.png,no\n")

    def used(policy: str) -> tuple[set[str], dict[str, str]]:
        caplog.clear()
        ingest(images, tmp_path / policy, IngestSettings(generated=policy), consent=consent)
        manifest = Manifest.load(tmp_path / policy)
        return {e.source for e in manifest.pictures}, {item.source: item.reason for item in manifest.quarantined}

    everything = {"made.png", "plain.png", "signed.avif", "stated.png"}
    assert used("allow") == (everything, {})
    assert "generated" not in caplog.text
    assert used("warn") == (everything, {})
    assert "2 images are generated, first made.png: generated (a1111-parameters)" in caplog.text
    refused = {"made.png": "is generated (a1111-parameters)", "stated.png": "is generated (as its owner states)"}
    assert used("refuse") == ({"plain.png", "signed.avif"}, refused)
