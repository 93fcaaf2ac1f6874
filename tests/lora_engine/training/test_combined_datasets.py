"""Several datasets in one training: each image has the settings of its own dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.base import BaseModel
from lora_engine.data.combine import CombineSettings, combine_datasets
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.training.batches import BatchBuilder
from lora_engine.training.examples import Encoder, read_examples
from lora_engine.training.specs.captions import Captions
from tests.lora_engine.training.runs import Ending, Runs, digests


def write_part(folder: Path, word: str, count: int, first: int = 0) -> Path:
    images = []
    for number in range(first, first + count):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(number)) * 2 - 1
        name = f"pictures/{digest[:16]}.png"
        write_png(folder / name, pixels)
        caption = f"{word}, one, two, three"
        images.append(
            ImageEntry(sha256=digest, file=name, width=16, height=16, caption=caption, source=f"{number}.png")
        )
    Manifest(pictures=tuple(images), trigger="sks", class_word=word).save(folder)
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Callable[..., Path]:
    def make(first: dict[str, Any], second: dict[str, Any], shared: int = 0) -> Path:
        stars, rings = write_part(tmp_path / "stars", "star", 2), write_part(tmp_path / "rings", "ring", 3, 2 - shared)
        settings = CombineSettings.model_validate({"parts": (first, second)})
        combine_datasets([stars, rings], tmp_path / "mixed", settings)
        return tmp_path / "mixed"

    return make


def build(base: BaseModel, folder: Path, cache: Path, **options: Any) -> BatchBuilder:
    examples = read_examples(folder, Manifest.load(folder), "train")
    captions = Captions.model_validate(options.pop("captions", {}))
    encoder = Encoder(base, cache, captions)
    return BatchBuilder(
        base, encoder.latents, encoder.conditioning, examples, batch=8, seed=1, captions=captions, **options
    )


def test_images_have_the_settings_of_their_dataset(
    mixed: Callable[..., Path], bases: dict[str, Path], shared: Any, tmp_path: Path
) -> None:
    folder = mixed(
        {"repeats": 3, "prefix": "a sketch, ", "shuffle": True, "keep_tokens": 1, "weight": 0.5},
        {"flip": True, "suffix": ", old"},
    )
    builder = build(shared[1](str(bases["small-sd"])), folder, tmp_path / "cache", captions={"prefix": "plain, "})
    seen = [example for number in range(9) for example in builder(number).examples]
    stars = [example for example in seen if "star" in example.caption]
    assert len(stars) == 2 * len(seen) // 3  # 2 images 3 times each, beside 3 images
    assert {caption.startswith("a sketch, star, ") for caption in (e.caption for e in stars)} == {True}
    assert len({example.caption for example in stars}) > 3
    assert {example.caption for example in seen if "ring" in example.caption} == {"plain, ring, one, two, three, old"}
    assert {e.augmentation.mirrored for e in seen if "ring" in e.caption} == {True, False}
    assert {e.augmentation.mirrored for e in stars} == {False}
    batch = builder(0)
    assert batch.weights is not None
    expected = [0.5 if "star" in example.caption else 1.0 for example in batch.examples]
    assert batch.weights.flatten().tolist() == expected
    assert set(expected) == {0.5, 1.0}


def test_captions_of_one_dataset_alone_are_dropped(
    mixed: Callable[..., Path], bases: dict[str, Path], shared: Any, tmp_path: Path
) -> None:
    folder = mixed({"caption_dropout": 1.0}, {})
    base = shared[1](str(bases["small-sd"]))
    batch = build(base, folder, tmp_path / "cache")(0)
    empty = base.encode_text([""], (16, 16))["states"][0]
    is_empty = [torch.equal(row, empty) for row in batch.conditioning["states"]]
    assert is_empty == ["star" in example.caption for example in batch.examples]
    assert set(is_empty) == {True, False}
    assert batch.weights is None


def test_the_same_image_may_be_in_both_datasets(mixed: Callable[..., Path]) -> None:
    manifest = Manifest.load(mixed({}, {}, shared=1))
    assert len(manifest.pictures) == 5
    assert len({image.file for image in manifest.pictures}) == 5
    assert len({image.sha256 for image in manifest.pictures}) == 4
    assert (manifest.trigger, manifest.class_word) == ("sks", None)


def test_a_run_on_several_datasets_resumes_to_the_same_bytes(runs: Runs, mixed: Callable[..., Path]) -> None:
    dataset = mixed({"repeats": 2, "shuffle": True, "caption_dropout": 0.5, "weight": 2.0}, {"flip": True})
    settings: dict[str, Any] = {"dataset": dataset, "method": "finetune", "steps": 4, "checkpoint_every": 2}
    expected = runs("straight", **settings)
    out, steps = runs.resume("resumed", [Ending(batch=0), Ending(batch=1, crashes=True)], **settings)
    assert steps == [3, 4]
    assert digests(out) == digests(expected)
