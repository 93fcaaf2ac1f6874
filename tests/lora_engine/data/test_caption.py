from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_engine.data.caption import caption
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import CaptionSettings, IngestSettings
from lora_engine.data.trigger import holds_word
from lora_engine.errors import DataError, SettingsError

Run = Callable[..., list[str]]


@pytest.fixture
def run(images: Path, tmp_path: Path, add_image: Callable[..., Path]) -> Run:
    def caption_all(own: list[str | None], **settings: Any) -> list[str]:
        for number, text in enumerate(own):
            add_image(f"{number}.png", caption=text)
        ingest(images, tmp_path / "in", IngestSettings())
        caption(tmp_path / "in", tmp_path / "out", CaptionSettings(**settings))
        return [image.caption for image in Manifest.load(tmp_path / "out").pictures]

    return caption_all


def test_own_captions_are_kept_and_missing_ones_come_from_the_template(run: Run) -> None:
    assert run(["a red thing", None], class_word="star") == ["a red thing", "a star"]


def test_every_caption_contains_the_trigger(run: Run) -> None:
    captions = run(["a red thing", "a SKS star", None, "sksy"], trigger="sks", class_word="star")
    assert captions == ["a sks star, a red thing", "a SKS star", "a sks star", "a sks star, sksy"]
    assert all(holds_word(text, "sks") for text in captions)


def test_the_template_captioner_ignores_own_captions(run: Run) -> None:
    assert run(["a red thing"], captioner="template", trigger="sks", template="photo of {trigger}") == ["photo of sks"]


def test_the_manifest_records_trigger_and_class_word(run: Run, tmp_path: Path) -> None:
    run([None], trigger="sks", class_word="teddy bear")
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.trigger, manifest.class_word) == ("sks", "teddy bear")
    caption(tmp_path / "out", tmp_path / "again", CaptionSettings())
    assert Manifest.load(tmp_path / "again").trigger == "sks"


def test_images_without_caption_or_template_words_are_refused(run: Run) -> None:
    with pytest.raises(SettingsError, match="set a trigger or a class word"):
        run([None])


def test_a_caption_that_the_trigger_makes_too_long_is_refused(run: Run) -> None:
    with pytest.raises(DataError, match=r"0\.png: the caption has 20\d\d characters"):
        run(["x" * 1_999], trigger="sks")


def test_the_images_are_copied_unchanged(run: Run, tmp_path: Path) -> None:
    run(["one", "two"])
    images = Manifest.load(tmp_path / "out").pictures
    assert len(images) == 2
    for image in images:
        assert (tmp_path / "out" / image.file).read_bytes() == (tmp_path / "in" / image.file).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"trigger": "two words"},
        {"trigger": ""},
        {"trigger": "<lora"},
        {"trigger": "a:1"},
        {"trigger": "{x}"},
        {"trigger": "x\x1b"},
        {"class_word": " star"},
        {"class_word": "a<b"},
        {"template": "{trigger.__class__}"},
        {"template": "{trigger!r}"},
        {"template": "{name}"},
        {"template": "{"},
        {"template": "two\nlines"},
        {"template": "no placeholder", "trigger": "sks"},
        {"captioner": "magic"},
        {"colour": "red"},
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        CaptionSettings(**settings)


def test_the_captioner_of_earlier_releases_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValidationError, match="'files' or 'template'"):
        CaptionSettings(captioner="interrogator")


def test_edits_and_trigger_reach_every_caption_that_may_be_drawn(images: Path, tmp_path: Path, add_image: Any) -> None:
    add_image("a.png", caption="a star, blurry\nthe sky\nblurry")
    add_image("b.png", caption="a moon")
    ingest(images, tmp_path / "in", IngestSettings(several_captions="draw"))
    edits = [{"edit": "blacklist", "tags": ["blurry"]}]
    settings = CaptionSettings.model_validate({"trigger": "sks", "class_word": "dog", "edits": edits})
    manifest = caption(tmp_path / "in", tmp_path / "out", settings)
    assert [image.captions for image in manifest.pictures] == [
        ("a sks dog, a star", "a sks dog, the sky", "a sks dog"),
        ("a sks dog, a moon",),
    ]
    assert Manifest.load(tmp_path / "out") == manifest
    assert "1 with several captions (3)" in manifest.describe()
    replaced = caption(tmp_path / "in", tmp_path / "new", CaptionSettings(captioner="template", class_word="dog"))
    assert [image.captions for image in replaced.pictures] == [("a dog",)] * 2
    long = CaptionSettings.model_validate({"edits": [{"edit": "suffix", "text": "x" * 498}] * 4})
    with pytest.raises(DataError, match=r"a\.png: the caption has 20\d\d characters"):
        caption(tmp_path / "in", tmp_path / "long", long)
