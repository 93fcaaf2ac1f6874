"""Provides small pipelines on generated images, and imports the fixtures of `tests.flows.shared`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.commands import PLAIN
from tests.flows.shared import draw_noise, prefect_database, prefect_server, trained, trained_here, trained_home

__all__ = ["draw_noise", "prefect_database", "prefect_server", "trained", "trained_here", "trained_home"]

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
    """Returns a function that writes a pipeline file beside a folder of noise images and returns its path."""

    def write(text: str = PREPARE, images: int = 4) -> Path:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for index in range(images):
            draw_noise(folder / f"{index}.png", index)
        path = tmp_path / "pipeline.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def environment(prefect_server: str, home: Path) -> dict[str, str]:
    """Returns the environment of a process with this test's home and the shared server."""
    # One thread, as in `trained_here`: the number of threads can change the last bits of a training.
    own = {"LORALINE_HOME": str(home), "PREFECT_API_URL": prefect_server, "OMP_NUM_THREADS": "1"}
    return os.environ | PLAIN | own
