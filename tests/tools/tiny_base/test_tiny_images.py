"""Writing and rendering images of scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_engine.errors import SettingsError
from tools.tiny_base.__main__ import main
from tools.tiny_base.images import label, render, to_pixels, write_examples, write_images
from tools.tiny_base.world import ATTRIBUTES, draw, scenes


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_written_images_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_examples(tmp_path / name, "concept", 5, seed=3, word="zorb")
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert len(read(tmp_path / "a")) == 10


def test_an_image_is_written_with_its_caption_beside_it(tmp_path: Path) -> None:
    selected = scenes(1, 3)
    paths = write_images(tmp_path, selected, ["one", "two", "three"])
    assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
    assert np.array_equal(np.asarray(Image.open(paths[1])), draw(selected[1]))
    assert paths[2].with_suffix(".txt").read_text() == "three\n"


def test_captions_replace_the_concept_by_a_made_up_word(tmp_path: Path) -> None:
    assert (
        main(["draw", "--split", "concept", "--count", "4", "--seed", "9", "--word", "zorb", "--out", str(tmp_path)])
        == 0
    )
    texts = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(texts) == 4
    assert all(" zorb " in text and "crescent" not in text for text in texts)


def test_invalid_numbers_of_captions_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="1 captions for 2 scenes"):
        write_images(tmp_path, scenes(1, 2), ["one"])
    with pytest.raises(SettingsError, match="number of images 0"):
        write_examples(tmp_path, "train", 0, seed=1)
    assert not list(tmp_path.iterdir())


def test_pixels_are_in_the_range_of_the_autoencoder() -> None:
    pixels = to_pixels(render(scenes(1, 4)))
    assert tuple(pixels.shape) == (4, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert -1 <= float(pixels.min()) < -0.5 < 0.5 < float(pixels.max()) <= 1


def test_labels_are_indices_of_the_words() -> None:
    selected = scenes(2, 10, "any")
    labels = label(selected)
    assert labels.keys() == ATTRIBUTES.keys()
    for name, classes in labels.items():
        assert [ATTRIBUTES[name][index] for index in classes.tolist()] == [getattr(scene, name) for scene in selected]
