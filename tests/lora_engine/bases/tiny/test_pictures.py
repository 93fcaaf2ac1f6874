"""Images on disk are the same bytes every time, with the right captions beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_engine.bases.tiny.__main__ import main
from lora_engine.bases.tiny.pictures import label, render, to_pixels, write_examples, write_images
from lora_engine.bases.tiny.world import ATTRIBUTES, draw, scenes
from lora_engine.errors import SettingsError


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_written_pictures_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_examples(tmp_path / name, "concept", 5, seed=3, word="zorb")
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert len(read(tmp_path / "a")) == 10


def test_a_written_picture_is_the_drawn_one_and_its_caption_lies_beside_it(tmp_path: Path) -> None:
    drawn = scenes(1, 3)
    paths = write_images(tmp_path, drawn, ["one", "two", "three"])
    assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
    assert np.array_equal(np.asarray(Image.open(paths[1])), draw(drawn[1]))
    assert paths[2].with_suffix(".txt").read_text() == "three\n"


def test_the_concept_goes_by_its_made_up_word(tmp_path: Path) -> None:
    assert (
        main(["draw", "--split", "concept", "--count", "4", "--seed", "9", "--word", "zorb", "--out", str(tmp_path)])
        == 0
    )
    texts = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(texts) == 4
    assert all(" zorb " in text and "crescent" not in text for text in texts)


def test_as_many_captions_as_pictures_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="1 captions for 2 scenes"):
        write_images(tmp_path, scenes(1, 2), ["one"])
    with pytest.raises(SettingsError, match="0 pictures"):
        write_examples(tmp_path, "train", 0, seed=1)
    assert not list(tmp_path.iterdir())


def test_batches_are_in_the_range_that_the_autoencoder_takes() -> None:
    pixels = to_pixels(render(scenes(1, 4)))
    assert tuple(pixels.shape) == (4, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert -1 <= float(pixels.min()) < -0.5 < 0.5 < float(pixels.max()) <= 1


def test_labels_are_the_places_of_the_words() -> None:
    drawn = scenes(2, 10, "any")
    labels = label(drawn)
    assert labels.keys() == ATTRIBUTES.keys()
    for name, classes in labels.items():
        assert [ATTRIBUTES[name][index] for index in classes.tolist()] == [getattr(scene, name) for scene in drawn]
