"""Files of generated images: what other programs and `lineage` read from PNG, WebP and JPEG."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager

from lora_engine.data.evidence import read_evidence
from lora_engine.data.images import open_image
from lora_engine.errors import DataError, SettingsError
from lora_engine.inference.image_files import (
    ImageFormat,
    ImageOptions,
    convert_png,
    encode_image,
    encode_marked,
    read_used_adapters,
)
from lora_engine.inference.image_metadata import UsedImage, source_type_of
from tests.lora_engine.inference.drawings import make_adapter, make_drawing, make_image

FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
PROMPT = "a zörb 鳥, <b>&amp; \U0001f600 <lora:zorb@3:0.7> <lora:other@1>"


def infotext_of(path: Path) -> str:
    """Returns the text where A1111 reads it (modules/images.py, read_info_from_image)."""
    with Image.open(path) as image:
        image.load()
        if "parameters" in image.info:
            return str(image.info["parameters"])
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return str(comment[8:].decode("utf-16-be"))


@pytest.mark.parametrize("kind", FORMATS)
def test_other_programs_read_prompt_settings_and_hashes(tmp_path: Path, kind: ImageFormat) -> None:
    adapter = make_adapter(tmp_path, "zorb@3")
    drawing = make_drawing("a red zorb <lora:zorb@3:0.7>", [adapter], "blue")
    path = tmp_path / "image"
    path.write_bytes(encode_image(make_image(), drawing, 7, ImageOptions(kind)))
    read = ParserManager().parse(path)
    assert read is not None
    (sampler,) = read.samplers
    assert sampler.name == "DPM++ 2M"
    assert sampler.parameters == {"cfg_scale": "3", "seed": "7", "steps": "12"}
    assert [prompt.value for prompt in sampler.prompts] == ["a red zorb <lora:zorb-v3:0.7>"]
    assert [prompt.value for prompt in sampler.negative_prompts] == ["blue"]
    # sd-parsers drops `Lora hashes`; A1111 and Civitai read it in the text.
    assert f'Lora hashes: "zorb-v3: {adapter.body_sha256[:12]}"' in infotext_of(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_names_its_adapters_exactly_and_ingest_recognizes_it(tmp_path: Path, kind: ImageFormat) -> None:
    adapters = [make_adapter(tmp_path, name) for name in ("zorb@3", "other@1")]
    path = tmp_path / "image"
    path.write_bytes(encode_image(make_image(), make_drawing(PROMPT, adapters), 7, ImageOptions(kind)))
    assert infotext_of(path).startswith(
        "a zörb 鳥, <b>&amp; \U0001f600 <lora:zorb-v3:0.7> <lora:other-v1:1>\nSteps: 12"
    )
    assert read_used_adapters(path) == {adapter.reference: adapter.sha256 for adapter in adapters}
    assert read_evidence(path, tmp_path) == ("a1111-parameters", "digital-source-type-trained-algorithmic-media")
    part = make_drawing(PROMPT, adapters, source=UsedImage("0" * 64, 0.5, "1" * 64))
    path.write_bytes(encode_image(make_image(), part, 7, ImageOptions(kind)))
    assert "digital-source-type-composite-with-trained-algorithmic-media" in read_evidence(path, tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_image_gives_the_same_bytes_and_its_pixels_come_back(tmp_path: Path, kind: ImageFormat) -> None:
    image, drawing, options = make_image(), make_drawing("a zorb", []), ImageOptions(kind, 100)
    content = encode_image(image, drawing, 7, options)
    assert content == encode_image(image, drawing, 7, options)
    path = tmp_path / "image"
    path.write_bytes(content)
    change = np.abs(np.asarray(open_image(path), dtype=int) - np.asarray(image, dtype=int))
    assert change.max() <= (4 if kind == "jpeg" else 0)
    if kind != "png":
        assert len(encode_image(image, drawing, 7, ImageOptions(kind, 30))) < len(content)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("source", [None, UsedImage("0" * 64, 0.5, "1" * 64)])
def test_a_stored_png_in_another_format_has_the_bytes_of_one_that_was_written_so(
    tmp_path: Path, kind: ImageFormat, source: UsedImage | None
) -> None:
    image, options = make_image(), ImageOptions(kind, 80)
    drawing = make_drawing(PROMPT, [make_adapter(tmp_path, name) for name in ("zorb@3", "other@1")], source=source)
    assert convert_png(encode_image(image, drawing, 7), options) == encode_image(image, drawing, 7, options)


def test_an_unfinished_image_keeps_its_mark_in_another_format(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(convert_png(encode_marked(make_image(), source_type_of(True)), ImageOptions("webp")))
    assert read_evidence(path, tmp_path) == ("digital-source-type-composite-with-trained-algorithmic-media",)


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_the_packet_is_xml_that_readers_of_xmp_parse(kind: ImageFormat) -> None:
    content = encode_image(make_image(), make_drawing("a <b>&amp; \x7f zorb", []), 7, ImageOptions(kind))
    with Image.open(io.BytesIO(content)) as image:
        description = image.getxmp()["xmpmeta"]["RDF"]["Description"]
    assert description["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert json.loads(description["generation"])["prompt"] == "a <b>&amp; \x7f zorb"


def test_metadata_that_a_jpeg_cannot_hold_is_refused_and_a_webp_holds_it(tmp_path: Path) -> None:
    drawing = make_drawing("zorb " * 8000, [])
    with pytest.raises(DataError, match="at most 65,000 in a JPEG"):
        encode_image(make_image(), drawing, 7, ImageOptions("jpeg"))
    (tmp_path / "a.webp").write_bytes(encode_image(make_image(), drawing, 7, ImageOptions("webp")))
    assert read_used_adapters(tmp_path / "a.webp") == {}


def test_images_of_other_programs_name_no_adapters(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        make_image().save(tmp_path / f"a.{suffix}")
        assert read_used_adapters(tmp_path / f"a.{suffix}") is None


def test_changed_metadata_is_refused(tmp_path: Path) -> None:
    drawing = make_drawing("a <lora:zorb@3>", [make_adapter(tmp_path, "zorb@3")])
    content = encode_image(make_image(), drawing, 7, ImageOptions("jpeg"))
    changed = content.replace(b'"sha256":"', b'"sha256":"x')
    assert changed != content
    (tmp_path / "a.jpg").write_bytes(changed)
    with pytest.raises(DataError, match=r"a\.jpg: the metadata 'loraline' names no adapters"):
        read_used_adapters(tmp_path / "a.jpg")


def test_a_marked_image_says_only_that_it_is_generated(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_marked(make_image(), "trainedAlgorithmicMedia"))
    assert read_evidence(tmp_path / "a.png", tmp_path) == ("digital-source-type-trained-algorithmic-media",)
    assert read_used_adapters(tmp_path / "a.png") is None


@pytest.mark.parametrize(("kind", "quality"), [("gif", 90), ("jpeg", 0), ("webp", 101)])
def test_unknown_formats_and_qualities_are_refused(kind: ImageFormat, quality: int) -> None:
    with pytest.raises(SettingsError, match=r"unknown image format|quality is"):
        ImageOptions(kind, quality)
