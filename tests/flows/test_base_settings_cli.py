"""Tests what a training and everything after it read of the base and of the original images, through pipeline files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.spec import load_spec
from tasks.job import prepare_job
from tests.flows.conftest import PREPARE
from tests.support.untrained import write_untrained_base

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_base(tmp_path_factory.mktemp("base") / "sdxl", "small-sdxl")


def key_of(path: Path, step: str, **inputs: str) -> str:
    spec = load_spec(path)
    return prepare_job(step, spec.steps[step], spec.folder).key({})


def test_original_sizes_are_recorded_for_a_base_that_reads_them_alone(pipeline: Write, sdxl: Path) -> None:
    plain = load_spec(pipeline()).steps["prepared"].model_dump()
    assert plain["original_sizes"] is False
    key = key_of(pipeline(), "prepared")
    adapter = "  adapter: {{uses: train, dataset: captions, steps: 1, base: {}}}\n"
    for text in (PREPARE.replace("base: tiny", f"base: {sdxl}"), PREPARE + adapter.format(sdxl)):
        assert load_spec(pipeline(text)).steps["prepared"].model_dump()["original_sizes"] is True
        assert key_of(pipeline(text), "prepared") != key
    off = PREPARE.replace("base: tiny", f"base: {sdxl}").replace(
        "resolution: 32", "resolution: 32, original_sizes: false"
    )
    assert load_spec(pipeline(off)).steps["prepared"].model_dump()["original_sizes"] is False
    assert key_of(pipeline(off), "prepared") == key
