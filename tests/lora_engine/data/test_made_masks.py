"""Masks from faces, texts, background and transparency; their final form; masks in folders of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.masks import finish_mask, overlay
from lora_engine.data.preparation_spec import BackgroundMask, FileMask, TextMask
from lora_engine.data.preprocess import preprocess
from lora_engine.data.segmentation import BackgroundMasker, TextMasker
from lora_engine.data.spec import IngestSettings, PreprocessSettings
from lora_engine.errors import DataError, SettingsError
from tests.support.photographs import photograph
from tests.support.untrained_vision import SIDE, write_clipseg, write_segformer

Add = Callable[..., Path]


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clipseg(tmp_path_factory.mktemp("models") / "clipseg")


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segformer(tmp_path_factory.mktemp("models") / "segformer")


@pytest.fixture
def prepare(images: Path, tmp_path: Path) -> Callable[..., Manifest]:
    """Ingests the folder and prepares it; the result is in `prepared`."""

    def run(**settings: Any) -> Manifest:
        ingest(images, tmp_path / "ingested", IngestSettings())
        wanted = PreprocessSettings.model_validate({"resolution": 64, **settings})
        return preprocess(tmp_path / "ingested", tmp_path / "prepared", wanted)

    return run


def mask_of(folder: Path, manifest: Manifest, index: int = 0) -> np.ndarray:
    name = manifest.pictures[index].mask
    assert name is not None
    return np.asarray(open_image(folder / name).convert("L"))


def test_a_mask_of_faces_is_white_over_the_face_only(
    images: Path, tmp_path: Path, prepare: Callable[..., Manifest]
) -> None:
    photograph("astronaut.png").save(images / "a.png")
    manifest = prepare(resolution=256, mask={"name": "faces", "margin": 1.0})
    values = mask_of(tmp_path / "prepared", manifest)
    rows, columns = np.nonzero(values)
    assert (columns.mean(), rows.mean()) == pytest.approx((113, 60), abs=4)
    assert np.ptp(columns) == pytest.approx(53, abs=6)
    assert set(np.unique(values)) >= {0, 255}
    assert manifest.describe_preparation() == "1 images; 1 masks of faces"


def test_images_whose_made_mask_marks_nothing_are_quarantined_unless_they_may_count(
    images: Path, tmp_path: Path, prepare: Callable[..., Manifest]
) -> None:
    photograph("astronaut.png").save(images / "a.png")
    photograph("coffee.png").save(images / "b.png")
    manifest = prepare(mask="faces")
    assert [entry.source for entry in manifest.pictures] == ["a.png"]
    assert [(item.source, item.reason) for item in manifest.quarantined] == [
        ("b.png", "its mask of faces marks nothing; allowed: a `minimum` above 0, or a mask file")
    ]
    manifest = prepare(mask={"name": "faces", "minimum": 0.2})
    assert len(manifest.pictures) == 2
    assert set(np.unique(mask_of(tmp_path / "prepared", manifest, 1))) == {51}
    manifest = prepare(mask={"name": "faces", "invert": True})
    assert set(np.unique(mask_of(tmp_path / "prepared", manifest, 1))) == {255}
    assert mask_of(tmp_path / "prepared", manifest, 0).min() == 0


def test_class_images_need_no_mask(images: Path, tmp_path: Path, prepare: Callable[..., Manifest]) -> None:
    for folder, name in (("5_sks woman", "astronaut.png"), ("1_woman", "coffee.png")):
        (images / folder).mkdir()
        photograph(name).save(images / folder / name)
    manifest = prepare(mask="faces")
    assert [entry.split for entry in manifest.pictures] == ["class", "train"]
    assert manifest.quarantined == ()


def test_own_masks_stay_unless_they_are_replaced(
    images: Path, tmp_path: Path, prepare: Callable[..., Manifest]
) -> None:
    photograph("astronaut.png").save(images / "a.png")
    Image.new("L", (512, 512), 99).save(images / "a.mask.png")
    manifest = prepare(mask="faces")
    assert set(np.unique(mask_of(tmp_path / "prepared", manifest))) == {99}
    assert manifest.pictures[0].preparation is None
    manifest = prepare(mask={"name": "faces", "replace": True})
    assert 0 in np.unique(mask_of(tmp_path / "prepared", manifest))
    assert prepare(mask="none").pictures[0].mask is None


def test_a_text_mask_is_the_thresholded_probability_of_the_model(clipseg: Path) -> None:
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation, ViTImageProcessorPil

    image = photograph("coffee.png")
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg).eval()
    pixels = ViTImageProcessorPil.from_pretrained(clipseg)(images=image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        tokens = AutoTokenizer.from_pretrained(clipseg)(["a cup"], return_tensors="pt")
        probability = torch.sigmoid(model(pixel_values=pixels, **tokens).logits).reshape(1, 1, SIDE, SIDE)
    middle = probability.median().item()
    options = TextMask(prompt="a cup", model=str(clipseg), threshold=middle, smooth=0)
    mask = np.asarray(TextMasker(options, "tiny")(image))
    assert mask.shape == (image.height, image.width)
    expected = F.interpolate(probability, (image.height, image.width), mode="bilinear")[0, 0] > middle
    assert 0.2 < expected.float().mean().item() < 0.8
    assert np.array_equal(mask > 0, expected.numpy())
    smoothed = TextMasker(options.model_copy(update={"smooth": 2}), "tiny")(image)
    padded = F.pad(probability, (2,) * 4, mode="replicate")
    mean = F.conv2d(padded, torch.full((1, 1, 5, 5), 1 / 25))
    expected = F.interpolate(mean, (image.height, image.width), mode="bilinear")[0, 0] > middle
    assert np.mean((np.asarray(smoothed) > 0) == expected.numpy()) > 0.999
    assert not np.array_equal(np.asarray(smoothed), mask)


def test_the_prompt_decides_what_a_text_mask_shows(clipseg: Path) -> None:
    image = photograph("coffee.png")
    masks = [
        np.asarray(TextMasker(TextMask(prompt=prompt, model=str(clipseg), threshold=0.5), "tiny")(image))
        for prompt in ("a cup", "the table", "a cup")
    ]
    assert np.array_equal(masks[0], masks[2])
    assert not np.array_equal(masks[0], masks[1])


def test_the_defaults_are_those_of_onetrainer() -> None:
    options = TextMask(prompt="a dog")
    assert (options.model, options.threshold) == ("CIDAS/clipseg-rd64-refined", 0.3)
    assert (options.smooth, options.expand) == (5, 10)


def test_a_text_mask_is_recorded_with_prompt_and_model(
    images: Path, clipseg: Path, prepare: Callable[..., Manifest]
) -> None:
    photograph("coffee.png").save(images / "a.png")
    manifest = prepare(mask={"name": "text", "prompt": "a cup", "model": str(clipseg), "threshold": 0.0})
    assert manifest.describe_preparation() == "1 images; 1 masks of text 'a cup' (clipseg)"


def test_a_background_mask_is_black_where_the_model_finds_background(segformer: Path) -> None:
    from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessorPil

    image = photograph("coffee.png")
    model = AutoModelForSemanticSegmentation.from_pretrained(segformer).eval()
    pixels = SegformerImageProcessorPil.from_pretrained(segformer)(images=image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        shares = torch.softmax(model(pixel_values=pixels).logits, dim=1)
    foreground = shares[:, 1:].sum(dim=1, keepdim=True)
    middle = foreground.median().item()
    options = BackgroundMask(model=str(segformer), threshold=middle)
    mask = np.asarray(BackgroundMasker(options, "tiny")(image)) > 0
    expected = F.interpolate(foreground, (image.height, image.width), mode="bilinear")[0, 0] > middle
    assert np.mean(mask == expected.numpy()) > 0.999
    assert 0.2 < mask.mean() < 0.8
    faces = options.model_copy(update={"labels": ("BACKGROUND", "face"), "threshold": 0.9999})
    assert not np.asarray(BackgroundMasker(faces, "tiny")(image)).any()


def test_a_model_without_the_label_is_refused_with_its_labels(segformer: Path) -> None:
    options = BackgroundMask(model=str(segformer), labels=("sky",))
    with pytest.raises(SettingsError, match=r"no label 'sky'.*Allowed: background, face, hair.*set labels"):
        BackgroundMasker(options, "tiny")


def test_another_model_is_refused(segformer: Path, clipseg: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"is a model of type 'segformer'.*Allowed: clipseg"):
        TextMasker(TextMask(prompt="a", model=str(segformer)), "tiny")
    with pytest.raises(SettingsError, match=r"the model cannot be loaded"):
        BackgroundMasker(BackgroundMask(model=str(clipseg)), "tiny")
    (tmp_path / "config.json").write_text('{"model_type": "clipseg"}')
    with pytest.raises(SettingsError, match=r"the model cannot be loaded"):
        TextMasker(TextMask(prompt="a", model=str(tmp_path)), "tiny")


@pytest.mark.parametrize("pixels", [1, 2, 3, 7, 40])
def test_a_widened_mask_is_the_maximum_over_a_square(pixels: int) -> None:
    values = (np.random.default_rng(0).random((30, 41)) ** 20 * 255).astype(np.uint8)
    widened = np.asarray(finish_mask(Image.fromarray(values), FileMask(expand=pixels)))
    height, width = values.shape
    for row, column in ((0, 0), (15, 20), (29, 40), (3, 39)):
        window = values[max(0, row - pixels) : row + pixels + 1, max(0, column - pixels) : column + pixels + 1]
        assert widened[row, column] == window.max()
    assert widened.shape == (height, width)


def test_a_feathered_mask_falls_off_at_its_border() -> None:
    mask = Image.new("L", (60, 20))
    mask.paste(255, (30, 0, 60, 20))
    row = np.asarray(finish_mask(mask, FileMask(feather=4.0)))[10].astype(int)
    assert np.all(np.diff(row) >= 0)
    assert (row[0], row[-1]) == (0, 255)
    assert row[30] == pytest.approx(128, abs=20)
    assert np.sum((row > 5) & (row < 250)) > 8


def test_options_without_effect_leave_a_mask_as_it_is() -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8)
    assert np.array_equal(finish_mask(Image.fromarray(values), FileMask()), values)
    assert np.array_equal(finish_mask(Image.fromarray(values), FileMask(invert=True)), 255 - values)
    least = np.asarray(finish_mask(Image.fromarray(values), FileMask(minimum=0.5)))
    assert (least.min() >= 128, least[values == values.max()].max()) == (True, values.max() // 2 + 128)


def test_an_overlay_shows_what_counts() -> None:
    image, mask = Image.new("RGB", (4, 2), (10, 200, 30)), Image.new("L", (4, 2))
    mask.paste(255, (2, 0, 4, 2))
    shown = np.asarray(overlay(image, mask))
    assert shown[0, 3].tolist() == [10, 200, 30]
    assert shown[0, 0, 0] > 100


def transparent(size: tuple[int, int] = (40, 32)) -> Image.Image:
    image = Image.new("RGBA", size, (10, 20, 30, 255))
    image.paste((10, 20, 30, 0), (0, 0, 10, size[1]))
    image.paste((10, 20, 30, 127), (10, 0, 20, size[1]))
    return image


def test_transparency_becomes_a_mask_if_asked(images: Path, tmp_path: Path, add_image: Add) -> None:
    transparent().save(images / "a.png")
    add_image("opaque.png")
    Image.new("RGBA", (40, 32), (1, 2, 3, 255)).save(images / "full.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings(alpha="mask"))
    assert [entry.mask is not None for entry in manifest.pictures] == [True, False, False]
    assert mask_of(tmp_path / "out", manifest)[0].tolist() == [0] * 10 + [127] * 10 + [255] * 20
    assert "1 masks; 1 of them from transparency" in manifest.describe()
    prepared = preprocess(tmp_path / "out", tmp_path / "two", PreprocessSettings(resolution=32))
    assert prepared.describe_preparation() == "3 images; 1 masks of transparency"
    assert mask_of(tmp_path / "two", prepared)[0].tolist() == [0] * 6 + [127] * 10 + [255] * 16
    plain = ingest(images, tmp_path / "plain", IngestSettings())
    assert [entry.mask for entry in plain.pictures] == [None] * 3


def test_a_mask_file_counts_more_than_transparency(images: Path, tmp_path: Path) -> None:
    transparent().save(images / "a.png")
    Image.new("L", (40, 32), 77).save(images / "a.mask.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings(alpha="mask"))
    assert set(np.unique(mask_of(tmp_path / "out", manifest))) == {77}
    assert manifest.pictures[0].preparation is None


@pytest.mark.parametrize(("background", "color"), [("#ffffff", (255, 255, 255)), ("#00Ff10", (0, 255, 16))])
def test_transparent_images_show_the_background(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, background: str, color: tuple[int, int, int]
) -> None:
    transparent().save(images / "a.png")
    gray = Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16))
    gray.save(images / "b.png", transparency=1000)
    manifest = ingest(images, tmp_path / "out", IngestSettings(background=background))
    for entry in manifest.pictures:
        assert open_image(tmp_path / "out" / entry.file).getpixel((0, 0)) == color
    assert open_image(tmp_path / "out" / manifest.pictures[0].file).getpixel((30, 0)) == (10, 20, 30)
    assert f"2 images are transparent in places, first a.png: they show the background {background}" in caplog.text


@pytest.mark.parametrize("inside", [False, True], ids=["beside the images", "among the images"])
def test_masks_in_a_folder_of_their_own_belong_to_images_of_the_same_name(
    images: Path, tmp_path: Path, add_image: Add, inside: bool
) -> None:
    masks = images / "conditioning" if inside else tmp_path / "conditioning"
    for name in ("a.jpg", "sub/a.png", "b.png"):
        add_image(name)
    for number, name in enumerate(("a.png", "sub/a.png", "other.png")):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 32), 50 + number).save(masks / name)
    manifest = ingest(images, tmp_path / "out", IngestSettings(), masks=masks)
    assert [entry.source for entry in manifest.pictures] == ["a.jpg", "b.png", "sub/a.png"]
    assert [entry.mask is not None for entry in manifest.pictures] == [True, False, True]
    assert mask_of(tmp_path / "out", manifest, 0)[0, 0] == 50
    assert mask_of(tmp_path / "out", manifest, 2)[0, 0] == 51
    (unused,) = manifest.quarantined
    assert unused.source == ("(masks)/other.png")
    assert unused.reason == "is a mask by its name, and no used image has that name"


def test_a_link_out_of_the_folder_of_masks_is_refused(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png")
    secret = add_image("b.png").rename(tmp_path / "secret.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").symlink_to(secret)
    with pytest.raises(DataError, match=r"a\.png: its mask \(masks\)/a\.png is a link that leads out of the folder"):
        ingest(images, tmp_path / "out", IngestSettings(), masks=tmp_path / "masks")


def test_a_folder_mask_holds_masks_only_of_images_that_exist(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png")
    add_image("mask/a.png")
    add_image("mask/venetian.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert {entry.source: entry.mask is not None for entry in manifest.pictures} == {
        "a.png": True,
        "mask/venetian.png": False,
    }
