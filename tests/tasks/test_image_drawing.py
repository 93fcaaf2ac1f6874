"""Images of a request in one process: what is read once, and what their files say."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_engine.files import sha256_file
from lora_engine.inference.image_files import CHUNK
from registry.home import Home
from tasks.operations.draw_request import DrawRequest
from tasks.operations.images import draw


def test_the_digest_of_an_image_to_start_from_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.png"
    Image.new("RGB", (32, 32), (250, 250, 250)).save(source)
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr("lora_engine.inference.draw.sha256_file", digest)
    request = DrawRequest("a ring", steps=2, count=2, batch=1, image=source)
    files = draw(request, tmp_path / "out", Home.open(tmp_path / "home").path)
    assert read == [source]
    for file in files:
        with Image.open(file) as drawn:
            assert sha256_file(source) in drawn.info[CHUNK]
