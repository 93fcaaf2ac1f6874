from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from lora_engine.data.buckets import bucket_sizes, choose_bucket
from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import Buckets, IngestSettings, PreprocessSettings
from lora_engine.errors import DataError

Add = Callable[..., Path]
SMALL = {"crop": "bucket", "resolution": 32, "buckets": {"step": 8, "enlarge": 4.0}}


def small(**change: Any) -> PreprocessSettings:
    return PreprocessSettings.model_validate({**SMALL, **change})


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (32, 8), (768, 8)])
def test_buckets_keep_the_area_the_step_and_the_sides(resolution: int, step: int) -> None:
    buckets = Buckets(step=step)
    sizes = bucket_sizes(resolution, buckets)
    low, high = buckets.sides(resolution)
    assert (resolution, resolution) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert low <= min(width, height)
        assert max(width, height) <= high
        # One more step would exceed the area, unless the longest side is reached.
        assert width * height <= resolution**2
        assert (width + step) * height > resolution**2 or (height + step) * width > resolution**2 or width == high


def test_the_buckets_of_512_include_the_usual_ones() -> None:
    sizes = set(bucket_sizes(512, Buckets(step=64, min_side=256, max_side=1024)))
    assert {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (1024, 256)} <= sizes


@given(st.integers(1, 5000), st.integers(1, 5000))
@example(214, 492)  # limited by `enlarge`, and its smaller size is a bucket too
def test_an_image_gets_the_nearest_shape_and_is_never_enlarged_beyond_the_limit(w: int, h: int) -> None:
    buckets = Buckets(step=64, enlarge=1.5)
    sizes = bucket_sizes(512, buckets)
    low, _ = buckets.sides(512)
    fit = choose_bucket((w, h), sizes, buckets, 512)
    distances = {size: abs(math.log(size[0] / size[1]) - math.log(w / h)) for size in sizes}
    nearest = [size for size in sizes if distances[size] <= min(distances.values()) + 1e-8]
    within_limit = {max(size[0] / w, size[1] / h) <= buckets.enlarge for size in nearest}
    if fit is None:
        # Only images that cannot fill the smallest side are refused.
        assert False in within_limit
        assert min(w, h) * buckets.enlarge < low
        return
    assert fit.scale == max(fit.size[0] / w, fit.size[1] / h) <= buckets.enlarge
    assert fit.resized[0] >= fit.size[0]
    assert fit.resized[1] >= fit.size[1]
    assert fit.size[0] % 64 == fit.size[1] % 64 == 0
    if within_limit == {True}:
        assert fit.size in nearest
    if within_limit == {False}:
        # Each side is rounded down to whole steps within the limit, and no further.
        assert any(
            all(
                fitted == min(side, int(own * buckets.enlarge) // 64 * 64)
                for fitted, side, own in zip(*sides, strict=True)
            )
            for sides in ((fit.size, size, (w, h)) for size in nearest)
        )


def test_the_limit_gives_a_small_image_a_smaller_size() -> None:
    sizes = bucket_sizes(512, Buckets())
    limited = choose_bucket((300, 200), sizes, Buckets(enlarge=1.5), 512)
    unlimited = choose_bucket((300, 200), sizes, Buckets(enlarge=64.0), 512)
    assert limited is not None
    assert unlimited is not None
    assert limited.size == (448, 256)
    assert unlimited.size in sizes
    assert unlimited.scale > 1.5
    assert choose_bucket((300, 200), sizes, Buckets(enlarge=1.0), 512) is None


@pytest.mark.parametrize("keep", ["center", "salient"])
def test_every_image_gets_the_bucket_of_its_shape(images: Path, tmp_path: Path, add_image: Add, keep: str) -> None:
    shapes = {"wide.png": (80, 40), "tall.png": (30, 66), "square.png": (50, 50)}
    for name, (width, height) in shapes.items():
        add_image(name, width=width, height=height)
    ingest(images, tmp_path / "one", IngestSettings())
    settings = small(buckets={"step": 8, "keep": keep})
    for out in ("two", "again"):
        manifest = preprocess(tmp_path / "one", tmp_path / out, settings)
    sizes = {image.source: (image.width, image.height) for image in manifest.pictures}
    assert sizes == {"wide.png": (40, 24), "tall.png": (24, 40), "square.png": (32, 32)}
    for image in manifest.pictures:
        assert open_image(tmp_path / "two" / image.file).size == (image.width, image.height)
        assert (tmp_path / "two" / image.file).read_bytes() == (tmp_path / "again" / image.file).read_bytes()


def test_salient_keeps_the_window_with_contrast(images: Path, tmp_path: Path) -> None:
    # 100 x 32 is wider than any bucket, so the image is cropped; only its right end has contrast.
    values = np.full((32, 100, 3), 128, dtype=np.uint8)
    values[:, 90:] = np.random.default_rng(0).integers(0, 256, (32, 10, 3))
    Image.fromarray(values).save(images / "a.png")
    ingest(images, tmp_path / "one", IngestSettings())
    spread = {}
    for keep in ("center", "salient"):
        manifest = preprocess(
            tmp_path / "one", tmp_path / keep, small(buckets={"step": 8, "keep": keep, "max_side": 40})
        )
        spread[keep] = np.asarray(open_image(tmp_path / keep / manifest.pictures[0].file)).std()
    assert spread["center"] < 2
    assert spread["salient"] > 10


def test_an_image_too_small_for_any_bucket_is_quarantined_with_its_size(
    images: Path, tmp_path: Path, add_image: Add
) -> None:
    add_image("good.png", width=40, height=32)
    add_image("tiny.png", width=4, height=3)
    ingest(images, tmp_path / "one", IngestSettings())
    manifest = preprocess(tmp_path / "one", tmp_path / "two", small(buckets={"step": 8, "enlarge": 2.0}))
    assert [image.source for image in manifest.pictures] == ["good.png"]
    assert [item.source for item in manifest.quarantined] == ["tiny.png"]
    assert "4 x 3 pixels" in manifest.quarantined[0].reason
    assert Manifest.load(tmp_path / "two") == manifest
    (images / "good.png").unlink()
    ingest(images, tmp_path / "three", IngestSettings())
    with pytest.raises(DataError, match="none of the 1 images can be used"):
        preprocess(tmp_path / "three", tmp_path / "four", small(buckets={"step": 8, "enlarge": 2.0}))
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"buckets": {"step": 12}}, "multiple of 8"),
        ({"buckets": {"step": 64}}, "no size is possible"),
        ({"buckets": {"step": 16, "min_side": 24}}, "min_side 24 is not a multiple of step 16"),
        ({"buckets": {"step": 8, "min_side": 40}}, "no size is possible"),
        ({"crop": "center"}, "buckets belongs to crop 'bucket'"),
        ({"buckets": {"step": 8, "enlarge": 0.5}}, "enlarge"),
    ],
)
def test_invalid_buckets_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        small(**change)
    assert small().buckets is not None
