"""Drawn and given class images are compared with the class where the training has an embedder of images and texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_engine.bases.base import load_base
from lora_engine.bases.source import TINY, resolve_base
from lora_engine.bases.tiny import folder as tiny_folder
from lora_engine.training.prior import ClassImages, find_clip
from lora_engine.training.spec import Prior
from tests.lora_engine.evaluation.embedders import write_random_embedder

Draw = Callable[..., None]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    source = resolve_base(TINY)
    base = load_base(source, device="cpu")

    def make(prompt: str, steps: int, *, compared: bool = True) -> None:
        clip = find_clip(None, source) if compared else None
        prior = Prior(count=8, steps=steps)
        ClassImages(base, prior, (prompt,), tmp_path / "class", 3, lambda done: None, clip).draw([(32, 32)])

    return make


def test_drawn_images_that_are_not_of_their_class_are_noticed(draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
    draw("a star", 1, compared=False)
    assert "less like" not in caplog.text
    draw("a star", 1)
    assert "the 8 class images are less like 'a star' than like any image; set another prior.prompt" in caplog.text
    caplog.clear()
    draw("a ring", 8)
    assert "less like" not in caplog.text


def test_only_embedders_of_texts_that_are_at_hand_compare(bases: dict[str, Path], tmp_path: Path) -> None:
    other = resolve_base(str(bases["small-sd"]))
    assert find_clip(None, other) is None
    clip = find_clip(tiny_folder() / "clip", other)
    assert clip is not None
    assert clip.model_type == "clip"
    assert find_clip(write_random_embedder(tmp_path / "dino", "dinov2"), other) is None
    assert find_clip(bases["small-sd"], other) is None, "no embedder at all"
