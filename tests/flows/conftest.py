"""Pipelines on small drawn pictures, and one Prefect server for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.prefect import configure_prefect
from flows.server import prefect_server as running_server
from registry.home import Home

PREPARE = """\
name: try
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: sks, class_word: star}
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Callable[..., Path]:
    """Writes a pipeline file beside a folder with four noisy pictures; gives its path."""

    def write(text: str = PREPARE, pictures: int = 4) -> Path:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for index in range(pictures):
            draw_noise(folder / f"{index}.png", index)
        path = tmp_path / "pipeline.yaml"
        path.write_text(text)
        return path

    return write


def draw_noise(path: Path, seed: int) -> None:
    """A 48 x 64 picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server of Prefect's own for the session, by its address; each run alone would start its own."""
    configure_prefect(Home(tmp_path_factory.mktemp("prefect")))
    with running_server() as address:
        yield address


@pytest.fixture
def environment(prefect_server: str, home: Path) -> dict[str, str]:
    """The environment of a command line that runs in this test's home and on the shared server."""
    return os.environ | {
        "LORALINE_HOME": str(home),
        "PREFECT_API_URL": prefect_server,
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }
