"""Law: no metadata of the user's images reaches the store, the database, MLflow, exports, pages or logs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from lora_engine.data.images import open_image
from tests.flows.commands import loraline_here
from tests.support.planted import MARKER, chunks_of_png, marks, plant

PIPELINE = """\
name: try
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/, heldout: 0.2}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: sks, class_word: star}
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 1}
  release:  {uses: register, adapter: adapter, name: stars, alias: canary}
  exports:  {uses: convert, adapter: adapter, to: [kohya]}
"""
BROKEN = {"a.png": 0.9, "b.jpg": 0.98, "c.webp": 0.6, "d.avif": 0.6, "e.tiff": 0.9, "f.gif": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name, content in plant():
        assert marks(content) > 0
        (images / name).write_bytes(content)
    for name, content in plant(seed=100):
        if name in BROKEN:
            (images / f"broken {name}").write_bytes(content[: int(len(content) * BROKEN[name])])
    return images


def test_the_marker_is_in_what_pillow_reads(folder: Path) -> None:
    places = 0
    for name, _ in plant():
        with Image.open(folder / name) as image:
            exif = image.getexif()
            texts = [
                *image.info.values(),
                *exif.values(),
                *exif.get_ifd(0x8769).values(),
                *exif.get_ifd(0x8825).values(),
            ]
            places += sum(marks(text if isinstance(text, bytes) else str(text).encode()) for text in texts)
        assert open_image(folder / name).size == (64, 48)
    assert places > 40


@pytest.mark.usefixtures("prefect_server", "trained_here")
def test_no_metadata_of_an_image_reaches_anything_that_is_written(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    home, out = tmp_path / "home", tmp_path / "out"
    out.mkdir()
    verbs = [
        ("dataset", folder, "-o", out / "page.html"),
        ("dataset", folder, "--json"),
        ("run", tmp_path / "pipeline.yaml"),
        ("show", "stars@1", "--json"),
        ("lineage", "stars@1", "--json"),
        ("export", "stars@1", "--to", "kohya", "-o", out / "stars.safetensors"),
        ("backup", out / "backup.zip"),
    ]
    shown = ""
    with caplog.at_level(logging.DEBUG):
        for verb in verbs:
            run = loraline_here(*verb, home=home)
            assert run.returncode == 0, run.stderr
            shown += run.stdout + run.stderr
    assert "broken a.png" in shown
    assert "a.png: generated (a1111-parameters)" in shown
    assert MARKER not in shown + caplog.text
    written = [path for root in (home, out) for path in root.rglob("*") if path.is_file()]
    assert {"lineage.db", "mlflow.db", "page.html"} <= {path.name for path in written}
    assert [path for path in written if marks(path.read_bytes())] == []
    images = [content for path in written if (content := path.read_bytes())[:4] == b"\x89PNG"]
    assert len(images) >= 16
    assert {kind for content in images for kind in chunks_of_png(content)} == {b"IHDR", b"IDAT", b"IEND"}
