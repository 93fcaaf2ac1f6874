"""Ten thousand images: flat memory, and a second run that decodes none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ingest import peak_memory
from lora_engine.data.images import encode_png
from tests.flows.commands import say
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
    # Their entries and prints take about 8 KiB each; decoded they would take 6.
    assert peak_memory(many) - peak_memory(few) < 100


@pytest.mark.nightly
@pytest.mark.usefixtures("prefect_server")
def test_a_second_run_decodes_no_image(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", 10_000)
    (tmp_path / "many.yaml").write_text(SPEC)
    first = json.loads(say("run", tmp_path / "many.yaml", "--json", home=tmp_path / "home"))["outcomes"]["photos"]
    # Equal sizes and times: only a run that read the images again would notice that they are none.
    for path in folder.iterdir():
        status = path.stat()
        path.write_bytes(np.random.default_rng(0).bytes(status.st_size))
        import os

        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = json.loads(say("run", tmp_path / "many.yaml", "--json", home=tmp_path / "home"))["outcomes"]["photos"]
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["ref"] == again["ref"]
