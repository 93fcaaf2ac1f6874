"""HEIC, the format of telephones, with the extra `heic`; without it the fix is named."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.ingest import ingest
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from tasks.digests import PathDigest
from tasks.steps.ingest import Ingest, find_revision
from tests.lora_engine.data.conftest import make_image

HAS_READER = importlib.util.find_spec("pillow_heif") is not None
needs_reader = pytest.mark.skipif(not HAS_READER, reason="needs the extra heic: pip install pillow-heif")
HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def photo() -> bytes:
    # The encoder is a part of the reader, which changes Pillow for the whole process.
    code = (
        "import sys, pillow_heif; from PIL import Image; pillow_heif.register_heif_opener()\n"
        "Image.linear_gradient('L').resize((48, 32)).convert('RGB').save(sys.stdout.buffer, format='HEIF', quality=90)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout


@needs_reader
def test_heic_is_read(images: Path, tmp_path: Path) -> None:
    (images / "a.heic").write_bytes(photo())
    (images / "b.jpg").write_bytes(photo())  # by its content
    (images / "cut.heic").write_bytes(photo()[:300])
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    (entry,) = manifest.pictures
    with Image.open(tmp_path / "out" / entry.file) as image:
        pixels = np.asarray(image.convert("L"), dtype=int)
    assert pixels.shape == (32, 48)
    expected = np.asarray(Image.linear_gradient("L").resize((48, 32)), dtype=int)
    assert np.abs(pixels - expected).max() < 20
    reasons = {item.source: item.reason for item in manifest.quarantined}
    assert reasons.keys() == {"b.jpg", "cut.heic"}
    assert reasons["b.jpg"] == "duplicate of a.heic"


@pytest.mark.skipif(HAS_READER, reason="the extra heic is installed")
def test_without_the_extra_the_fix_is_named(images: Path, tmp_path: Path) -> None:
    (images / "a.heic").write_bytes(HEADER)
    buffer = io.BytesIO()
    make_image().save(buffer, format="PNG")
    (images / "b.png").write_bytes(buffer.getvalue())
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert [(item.source, item.reason) for item in manifest.quarantined] == [
        ("a.heic", "is HEIC, which needs pillow-heif: pip install 'loraline[heic]'")
    ]


def test_a_broken_heic_is_refused(images: Path, tmp_path: Path) -> None:
    (images / "a.heic").write_bytes(HEADER)
    with pytest.raises(DataError, match="none of the 1 files can be used"):
        ingest(images, tmp_path / "out", IngestSettings())


@pytest.mark.parametrize(("is_installed", "revision"), [(True, 7), (False, 6)])
def test_a_result_without_the_extra_is_not_used_with_it(
    monkeypatch: pytest.MonkeyPatch, *, is_installed: bool, revision: int
) -> None:
    monkeypatch.setattr("tasks.steps.ingest.find_spec", lambda _: object() if is_installed else None)
    spec = Ingest(images="images")
    revisions = [
        find_revision(spec, {"images": PathDigest("0" * 64, dict.fromkeys(names, ""), {})})
        for names in (["a.heic"], ["a.png"], ["10_a/a.png"], ["x.zip"], ["."])
    ]
    assert revisions == [revision, 3, 5, revision, revision]
