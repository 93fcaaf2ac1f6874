"""Taggers run with onnxruntime, an optional package; without it, their tests are skipped except those of refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_engine.captioning.source import resolve_tagger
from lora_engine.captioning.tagger import Tagger, load_tagger
from lora_engine.data.captioner_options import TaggerOptions
from lora_engine.errors import BaseModelError, SettingsError
from tests.support.color_tagger import write_tagger

RED, YELLOW = (255, 0, 0), (255, 255, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tagger(tmp_path / "tagger")


def load(folder: Path, **options: Any) -> Tagger:
    pytest.importorskip("onnxruntime", reason="taggers need the extra 'taggers'")
    return load_tagger(resolve_tagger(folder), TaggerOptions(model=str(folder), **options))


def tags(folder: Path, color: tuple[int, int, int], size: tuple[int, int] = (16, 16), **options: Any) -> str:
    (text,) = load(folder, **options).describe([Image.new("RGB", size, color)])
    return text


def test_tags_above_their_thresholds_are_given_the_most_probable_first(folder: Path) -> None:
    assert tags(folder, RED) == "red sky, ^_^"
    assert sorted(tags(folder, YELLOW).split(", ")) == ["^_^", "green grass", "red sky"]
    assert tags(folder, RED, general=0.9) == "red sky"
    assert tags(folder, (0, 0, 255)) == "blue sea"


def test_characters_have_a_threshold_of_their_own_and_come_first(folder: Path) -> None:
    assert tags(folder, RED, character=0.5) == "ann (x), red sky, ^_^"
    assert tags(folder, RED, character=1.0) == "red sky, ^_^"


def test_the_rating_is_given_on_request_and_the_number_of_tags_is_bounded(folder: Path) -> None:
    assert tags(folder, RED, rating=True) == "red sky, ^_^, general"
    assert tags(folder, YELLOW, max_tags=1) in {"red sky", "green grass"}


def test_images_are_padded_with_white_to_a_square(folder: Path) -> None:
    # Three quarters of the square are white, so every color is likely.
    assert set(tags(folder, RED, size=(4, 16)).split(", ")) == {"red sky", "blue sea", "green grass", "^_^"}


def test_a_table_that_does_not_fit_is_refused(folder: Path) -> None:
    table = folder / "selected_tags.csv"
    table.write_text(table.read_text() + "9,more,0,1\n")
    with pytest.raises(BaseModelError, match=r"gives 7 values, and selected_tags\.csv has 8 tags"):
        tags(folder, RED)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.onnx", b"\x80\x04pickle", "cannot be loaded"),
        ("selected_tags.csv", b"name\n", "names no tags"),
        ("selected_tags.csv", b"\xff\xfe\x00", "selected_tags.csv"),
    ],
)
def test_damaged_files_are_refused(folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(BaseModelError, match=message):
        load(folder)


@pytest.mark.parametrize("file", ["model.onnx", "selected_tags.csv"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(BaseModelError, match=f"the tagger has no {file}"):
        resolve_tagger(folder)


def test_without_onnxruntime_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SettingsError, match=r"loraline\[taggers\]"):
        load_tagger(resolve_tagger(folder), TaggerOptions(model=str(folder)))
