"""Captions of models are cached one by one by content, resumed, and composed with existing ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lora_engine.captioning.describe as describe_module
from lora_engine.captioning.source import resolve_vlm
from lora_engine.captioning.vlm import load_vlm
from lora_engine.data.caption import caption
from lora_engine.data.captioner_options import MAX_DESCRIPTION, VlmOptions
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import MAX_CAPTION, Manifest
from lora_engine.data.spec import CaptionSettings, IngestSettings
from lora_engine.errors import InterruptedRun, SettingsError
from tests.support.color_tagger import write_tagger

TOKENS = 6


@pytest.fixture
def dataset(tmp_path: Path, shown: list[Image.Image]) -> Path:
    """Returns a dataset of three images; the first has a caption."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(shown):
        image.save(folder / f"{number}.png")
    (folder / "0.caption").write_text("own words")
    ingest(folder, tmp_path / "dataset", IngestSettings())
    return tmp_path / "dataset"


@pytest.fixture
def run(dataset: Path, tmp_path: Path, captioners: dict[str, Path]) -> Callable[..., Manifest]:
    def run(progress: Any = None, cache: Path | None = None, **settings: Any) -> Manifest:
        options = {"name": "vlm", "model": str(captioners["idefics3"]), "max_tokens": TOKENS}
        options |= settings.pop("options", {})
        spec = CaptionSettings(captioner=options, **settings)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        extra = {"progress": progress} if progress else {}
        return caption(dataset, tmp_path / "out", spec, cache=cache, labels={"vlm": "smol@1"}, **extra)

    return run


@pytest.fixture
def described(captioners: dict[str, Path], shown: list[Image.Image]) -> list[str]:
    options = VlmOptions(model="x", max_tokens=TOKENS)
    model = load_vlm(resolve_vlm(captioners["idefics3"]), options)
    prompt = model.family.prompts["sentences"]
    return [text for image in shown for text in model.describe([image], [prompt])]


def texts(manifest: Manifest) -> list[str]:
    return [image.caption for image in manifest.pictures]


def origins(manifest: Manifest) -> list[str | None]:
    return [image.caption_origin for image in manifest.pictures]


def test_existing_captions_are_kept_replaced_or_appended_to(run: Callable[..., Manifest], described: list[str]) -> None:
    kept, replaced, appended = (run(existing=how) for how in ("keep", "replace", "append"))
    assert texts(kept) == ["own words", *described[1:]]
    assert origins(kept) == [".caption", "smol@1", "smol@1"]
    assert texts(replaced) == described
    assert origins(replaced) == ["smol@1"] * 3
    assert texts(appended) == [f"own words, {described[0]}", *described[1:]]
    assert origins(appended) == [".caption + smol@1", "smol@1", "smol@1"]


def test_appending_twice_appends_once(run: Callable[..., Manifest], tmp_path: Path) -> None:
    first = run(existing="append")
    (tmp_path / "images" / "0.caption").write_text(texts(first)[0])
    shutil.rmtree(tmp_path / "dataset")
    ingest(tmp_path / "images", tmp_path / "dataset", IngestSettings())
    again = run(existing="append")
    assert (texts(again)[0], origins(again)[0]) == (texts(first)[0], ".caption")


def test_the_words_of_folders_are_kept_before_the_caption(
    run: Callable[..., Manifest], described: list[str], tmp_path: Path
) -> None:
    images, folder = tmp_path / "images", tmp_path / "kohya" / "10_sks dog"
    folder.parent.mkdir()
    images.rename(folder)
    shutil.rmtree(tmp_path / "dataset")
    ingest(folder.parent, tmp_path / "dataset", IngestSettings())
    captioned = run()
    assert texts(captioned) == ["own words", *(f"sks dog, {text}" for text in described[1:])]
    assert origins(captioned) == [".caption", "folder name + smol@1", "folder name + smol@1"]
    assert texts(run(existing="replace")) == described


def test_an_empty_caption_of_a_model_does_not_end_the_run(
    run: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe_module, "describe_with_vlm", lambda job: ["" for _ in job.images])
    assert texts(run()) == ["own words", "", ""]
    filled = run(class_word="dog")
    assert texts(filled) == ["own words", "a dog", "a dog"]
    assert origins(filled) == [".caption", "template", "template"]


def test_trigger_and_edits_apply_to_captions_of_models_and_of_files(
    run: Callable[..., Manifest], described: list[str]
) -> None:
    edits = [{"edit": "prefix", "text": "photo"}, {"edit": "replace", "text": "own", "by": "my"}]
    captioned = run(trigger="sks", class_word="dog", edits=edits)
    assert texts(captioned) == [f"a sks dog, photo, {text}" for text in ("my words", *described[1:])]
    assert captioned.trigger == "sks"


def test_an_interrupted_run_resumes_and_gives_the_same_captions(
    run: Callable[..., Manifest], described: list[str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def stop(done: int, total: int, values: Mapping[str, float]) -> None:
        if done == 2:
            raise InterruptedRun("stopped on request")

    with pytest.raises(InterruptedRun):
        run(progress=stop, cache=cache, existing="replace")
    first = {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")}
    assert len(first) == 2
    assert texts(run(cache=cache, existing="replace")) == described
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert len(list(cache.rglob("*.json"))) == 3


def test_captions_are_read_from_the_cache_without_the_model_until_something_changes(
    run: Callable[..., Manifest], described: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    run(cache=cache)

    class LoadedError(Exception):
        pass

    def fail(*_: object) -> None:
        raise LoadedError

    monkeypatch.setattr(describe_module, "load_vlm", fail)
    assert texts(run(cache=cache)) == ["own words", *described[1:]]
    assert texts(run(cache=cache, options={"batch_size": 2, "device": "cpu"})) == ["own words", *described[1:]]
    for options in ({"prompt": "Describe."}, {"max_tokens": 5}, {"style": "tags"}):
        with pytest.raises(LoadedError):
            run(cache=cache, options=options)
    # A damaged entry is made again.
    next(cache.rglob("*.json")).write_bytes(b"{")
    with pytest.raises(LoadedError):
        run(cache=cache)


def test_a_model_is_not_needed_if_every_image_has_a_caption(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    for number in (1, 2):
        (tmp_path / "images" / f"{number}.txt").write_text("words")
    shutil.rmtree(tmp_path / "dataset")
    ingest(tmp_path / "images", tmp_path / "dataset", IngestSettings())
    assert texts(run(options={"model": str(tmp_path / "nowhere")})) == ["own words", "words", "words"]


def test_words_of_the_prompt_come_from_trigger_class_and_existing_caption(
    run: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = describe_module.load_vlm

    def load(*arguments: Any) -> Any:
        model = original(*arguments)
        describe = model.describe
        model.describe = lambda images, prompts: seen.extend(prompts) or describe(images, prompts)
        return model

    monkeypatch.setattr(describe_module, "load_vlm", load)
    run(options={"prompt": "{trigger} {class_word}: {caption}!"}, trigger="sks", class_word="dog", existing="replace")
    assert seen == ["sks dog: own words!", "sks dog: !", "sks dog: !"]


def test_a_caption_of_a_megabyte_is_bounded(
    run: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "images" / "0.caption").write_text("x" * 1_000_000)
    shutil.rmtree(tmp_path / "dataset")
    ingested = ingest(tmp_path / "images", tmp_path / "dataset", IngestSettings())
    assert [item.source for item in ingested.quarantined] == ["0.caption"]
    monkeypatch.setattr(describe_module, "describe_with_vlm", lambda job: ["y" * MAX_DESCRIPTION for _ in job.images])
    captioned = run(trigger="sks", template="z" * 400 + " {trigger}")
    assert [len(text) for text in texts(captioned)] == [MAX_DESCRIPTION + 406] * 3
    (tmp_path / "images" / "0.caption").write_text("x" * (MAX_CAPTION - 500))
    shutil.rmtree(tmp_path / "dataset")
    ingest(tmp_path / "images", tmp_path / "dataset", IngestSettings())
    assert texts(run(trigger="sks", existing="append"))[0] == "a sks, " + "x" * (MAX_CAPTION - 500)


def test_the_tags_of_a_tagger_are_hints_in_the_prompt(
    run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="taggers need the extra 'taggers'")
    seen: list[str] = []
    monkeypatch.setattr(
        describe_module, "fill_prompt", lambda prompt, words: seen.append(words["tags"]) or prompt.format(**words)
    )
    tagger = {"model": str(write_tagger(tmp_path / "tagger"))}
    run(options={"tagger": tagger}, cache=tmp_path / "cache")
    assert seen == ["red sky, ^_^", ""]
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 4


def test_tags_are_refused_for_a_model_that_follows_no_instruction(
    run: Callable[..., Manifest], captioners: dict[str, Path], tmp_path: Path
) -> None:
    options = {"model": str(captioners["blip"]), "tagger": {"model": str(write_tagger(tmp_path / "tagger"))}}
    with pytest.raises(SettingsError, match="BLIP follows no instruction"):
        run(options=options)


def test_a_tagger_captions_alone(run: Callable[..., Manifest], dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="taggers need the extra 'taggers'")
    settings = CaptionSettings(
        captioner={"name": "tagger", "model": str(write_tagger(tmp_path / "tagger"))}, trigger="sks"
    )
    captioned = caption(dataset, tmp_path / "tagged", settings)
    assert texts(captioned) == ["a sks, own words", "a sks, red sky, ^_^", "a sks"]
    assert origins(captioned) == [".caption", "tagger", "template"]
