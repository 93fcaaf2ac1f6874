"""The recipe runs from nothing to a measured base, and goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_engine.bases.tiny.card import read_figures
from lora_engine.bases.tiny.recipe import STAGES, build
from lora_engine.bases.tiny.stage import BuildSettings
from lora_engine.errors import TrainingError

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_training_that_fails_stops_the_build_and_is_named(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name in ("tokenizer", "clip", "vae", "vae.json", "judge.safetensors"):
        (work / name).mkdir(parents=True)
    with pytest.raises(TrainingError, match="'diffusion' ended with exit code 1"):
        build(work, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
