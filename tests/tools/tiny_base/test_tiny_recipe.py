"""The recipe builds and measures a base, and resumes an interrupted build."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from lora_engine.errors import BaseModelError, TrainingError
from tools.tiny_base.card import read_figures
from tools.tiny_base.recipe import STAGES, build
from tools.tiny_base.stage import BuildSettings

SMALL = BuildSettings(
    scenes=64,
    judge_scenes=(64, 16, 16),
    vae_steps=2,
    polish_steps=2,
    judge_steps=2,
    clip_steps=2,
    clip_more_steps=1,
    text_steps=2,
    diffusion_steps=2,
)


@pytest.mark.nightly
def test_every_stage_of_the_recipe_runs_once(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "weights"
    build(work, out, SMALL, captions=4)
    assert all((work / stage.result).exists() for stage in STAGES.values())
    assert (out / "model_index.json").is_file()
    assert read_figures(out)["follows"]["n"] == 4

    before = {
        path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and path.name != "settings.json"
    }
    weights = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    build(work, out, SMALL, captions=4)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == weights


@pytest.fixture
def diffusion_is_next(tmp_path: Path) -> Path:
    """A work folder in which all trainings but the last have (invalid) results."""
    work = tmp_path / "work"
    for stage in STAGES.values():
        (work / stage.result).mkdir(parents=True)
    (work / STAGES["diffusion"].result).rmdir()
    return work


@pytest.mark.nightly
def test_a_failed_training_stops_the_build_and_is_named(diffusion_is_next: Path, tmp_path: Path) -> None:
    for name in ("clip", "vae"):
        (diffusion_is_next / name).mkdir(exist_ok=True)
    with pytest.raises(TrainingError, match="'diffusion' failed with exit code 1"):
        build(diffusion_is_next, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_training_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training process fails immediately with exit code 1."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))


@pytest.mark.usefixtures("no_training_can_start")
def test_a_failed_process_stops_the_build_and_its_training_is_named(diffusion_is_next: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="'diffusion' failed with exit code 1"):
        build(diffusion_is_next, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training_can_start")
def test_a_finished_training_is_skipped(diffusion_is_next: Path, tmp_path: Path) -> None:
    (diffusion_is_next / STAGES["diffusion"].result).mkdir()
    with pytest.raises(BaseModelError, match="unet, text_encoder"):  # raised by the assembly, after all trainings
        build(diffusion_is_next, tmp_path / "out", SMALL)
