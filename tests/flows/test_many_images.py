"""Ten thousand images: flat memory, and a second run that decodes none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ingest import only_ingest, peak_memory
from lora_engine.data.decoders import Decoders
from lora_engine.data.images import encode_png
from lora_engine.errors import DataError
from tests.flows.commands import loraline_here, say
from tests.lora_engine.data.conftest import make_image

SPEC = """\
name: many
base: tiny
steps:
  photos: {uses: ingest, images: images/}
"""


def draw(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encode_png(make_image(48, 40, number)))
    return folder


@pytest.mark.nightly
def test_the_memory_of_ingest_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    few, many = draw(tmp_path / "few", 1_250), draw(tmp_path / "many", 10_000)
    # Their entries and prints take 5 KiB each: 40 MiB of 8,750 images. Decoded they would take 6 KiB more.
    assert peak_memory(many, only_ingest) - peak_memory(few, only_ingest) < 60


@pytest.mark.parametrize("count", [5, pytest.param(10_000, marks=pytest.mark.nightly)])
@pytest.mark.usefixtures("prefect_server")
def test_a_second_run_decodes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    folder, spec, home = draw(tmp_path / "images", count), tmp_path / "many.yaml", tmp_path / "home"
    spec.write_text(SPEC)
    first = json.loads(say("run", spec, "--json", home=home))["outcomes"]["photos"]

    def refuse(*_: object, **__: object) -> Iterator[tuple[dict[str, object], bytes]]:
        raise DataError("an image is decoded")

    monkeypatch.setattr(Decoders, "request", refuse)
    again = json.loads(say("run", spec, "--json", home=home))["outcomes"]["photos"]
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["ref"] == again["ref"]
    (folder / "another.png").write_bytes(encode_png(make_image(48, 40, count)))
    assert "an image is decoded" in loraline_here("run", spec, home=home).stderr
