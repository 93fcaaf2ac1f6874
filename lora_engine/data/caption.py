"""Writes the final caption of every image of a dataset, including the trigger if there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.data.caption_files import FOLDER, TEXT
from lora_engine.data.captioner_options import RESERVED
from lora_engine.data.captioners import CAPTIONERS, DescribeJob
from lora_engine.data.editing import edit_captions
from lora_engine.data.manifest import MAX_CAPTION, ImageEntry, Manifest
from lora_engine.data.spec import PLACEHOLDERS, CaptionSettings
from lora_engine.data.trigger import add_trigger
from lora_engine.errors import DataError
from lora_engine.files import atomic_write
from lora_engine.parallel import Workers
from lora_engine.progress import Progress, no_progress
from lora_engine.registries import import_target

TEMPLATE_ORIGIN = "template"
"""The origin of captions that are the filled template."""
_MAX_ORIGIN = 300


@dataclass(frozen=True)
class _Described:
    """Captions before edits, and where each is from."""

    texts: list[str]
    origins: list[str | None]


def caption(
    dataset: Path,
    out: Path,
    settings: CaptionSettings,
    progress: Progress = no_progress,
    *,
    cache: Path | None = None,
    labels: Mapping[str, str] | None = None,
) -> Manifest:
    """Writes a copy of the dataset with captions; the manifest records trigger and class word.

    Args:
        dataset: The dataset.
        out: The folder for its copy.
        settings: See `CaptionSettings`.
        progress: Called after each image.
        cache: Folder in which captions of models are kept, one by one and by content; None keeps none.
        labels: Role -> name of a model for the origins of captions; None takes the captioner's name.

    Raises:
        DataError: The dataset is incomplete, or a caption becomes too long.
        SettingsError: An image has no caption, and there is neither trigger nor class word for the template.
        BaseModelError: A model cannot be found, loaded or run.
    """
    manifest = Manifest.load(dataset)
    # Class images keep their own captions: trigger and template are about the concept.
    concept = manifest.model_copy(update={"pictures": tuple(i for i in manifest.pictures if i.split != "class")})
    captions = _describe(dataset, concept, settings, progress, cache, labels or {})
    further = [_kept_alternatives(image, text) for image, text in zip(concept.pictures, captions.texts, strict=True)]
    # Edits see all captions at once, since some count tags.
    texts = iter(_complete([*captions.texts, *(text for kept in further for text in kept)], settings))
    firsts = [next(texts) for _ in concept.pictures]
    changes: dict[str, dict[str, Any]] = {
        image.file: {
            "caption": text,
            "caption_origin": _origin_of(image, before, origin, settings),
            "alternatives": tuple(dict.fromkeys(next(texts) for _ in kept)) or None,
        }
        for image, text, before, origin, kept in zip(
            concept.pictures, firsts, captions.texts, captions.origins, further, strict=True
        )
    }
    images = []
    total = len(manifest.pictures)
    with Workers() as workers:
        for done, image in enumerate(manifest.pictures, start=1):
            captioned = image.model_copy(update=changes.get(image.file, {}))
            _refuse_long(captioned)
            images.append(captioned)
            for file in image.files:
                workers.run(_copy, dataset / file, out / file)
            progress(done, total, {})
    # A step without a trigger keeps the trigger of an earlier step.
    words = {name: getattr(settings, name) or getattr(manifest, name) for name in PLACEHOLDERS}
    result = manifest.model_copy(update={"pictures": tuple(images), **words})
    result.save(out)
    return result


def _kept_alternatives(image: ImageEntry, described: str) -> tuple[str, ...]:
    """Returns the alternatives of a caption that a captioner left, or wrote more after."""
    return (image.alternatives or ()) if described.startswith(image.caption) else ()


def _origin_of(image: ImageEntry, text: str, origin: str | None, settings: CaptionSettings) -> str | None:
    if not settings.is_reported:
        return image.caption_origin
    return origin if text or not (settings.trigger or settings.class_word) else TEMPLATE_ORIGIN


def _describe(
    dataset: Path,
    manifest: Manifest,
    settings: CaptionSettings,
    progress: Progress,
    cache: Path | None,
    labels: Mapping[str, str],
) -> _Described:
    captioner = CAPTIONERS[settings.captioner_name]
    own = [image.caption for image in manifest.pictures]
    origins = [image.caption_origin for image in manifest.pictures]
    if captioner.captions is not None:
        texts = captioner.captions(dataset, manifest, settings, progress)
        return _Described(texts, origins if texts == own else [captioner.name] * len(texts))
    keeps = settings.existing == "keep"
    positions = [index for index, image in enumerate(manifest.pictures) if not (keeps and has_own_caption(image))]
    job = DescribeJob(
        images=tuple(dataset / manifest.pictures[index].file for index in positions),
        texts=tuple(own[index] for index in positions),
        options=settings.captioner,
        words={name: getattr(settings, name) or "" for name in PLACEHOLDERS},
        cache=cache,
        progress=progress,
    )
    label = (" + ".join(labels.values()) or captioner.name)[:_MAX_ORIGIN]
    # Without images there is nothing to load a model for.
    made = import_target(CAPTIONERS, captioner.name, captioner.describe)(job) if positions else []
    for index, text in zip(positions, made, strict=True):
        if own[index] and settings.existing != "replace":
            addition = text[: max(0, MAX_CAPTION - RESERVED - len(own[index]))]
            # An earlier run may have appended the same.
            if addition and addition not in own[index]:
                origins[index] = f"{origins[index] or TEXT} + {label}"[:_MAX_ORIGIN]
                own[index] = f"{own[index]}, {addition}"
        else:
            own[index], origins[index] = text, label
    return _Described(own, origins)


def has_own_caption(image: ImageEntry) -> bool:
    """Returns True if an image has a caption; the words of its folder are what a captioner's text comes after."""
    return bool(image.caption) and image.caption_origin != FOLDER


def _complete(texts: Sequence[str], settings: CaptionSettings) -> list[str]:
    if settings.edits:
        texts = edit_captions(texts, settings.edits, settings)
    if CAPTIONERS[settings.captioner_name].adds_trigger:
        return [*texts]
    return [add_trigger(text, settings) for text in texts]


def _refuse_long(image: ImageEntry) -> None:
    longest = max(map(len, image.captions))
    if longest > MAX_CAPTION:
        raise DataError(
            f"the caption has {longest} characters with the trigger",
            where=image.source,
            allowed=f"{MAX_CAPTION}",
            remedy="shorten it",
        )


def _copy(source: Path, target: Path) -> None:
    atomic_write(target, source.read_bytes())
