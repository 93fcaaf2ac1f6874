"""Writes the final caption of every image of a dataset, including the trigger if there is one."""

from __future__ import annotations

import re
from pathlib import Path

from lora_engine.data.captioners import CAPTIONERS
from lora_engine.data.manifest import MAX_CAPTION, Manifest
from lora_engine.data.spec import PLACEHOLDERS, CaptionSettings
from lora_engine.data.text_files import clean_text
from lora_engine.errors import DataError, SettingsError
from lora_engine.files import atomic_write
from lora_engine.parallel import Workers
from lora_engine.progress import Progress, no_progress


def caption(dataset: Path, out: Path, settings: CaptionSettings, progress: Progress = no_progress) -> Manifest:
    """Writes a copy of the dataset with captions; the manifest records trigger and class word.

    Raises:
        DataError: The dataset is incomplete, or a caption becomes too long.
        SettingsError: An image has no caption, and there is neither trigger nor class word for the template.
    """
    manifest = Manifest.load(dataset)
    # Class images keep their own captions: trigger and template are about the concept.
    concept = manifest.model_copy(update={"pictures": tuple(i for i in manifest.pictures if i.split != "class")})
    captions = CAPTIONERS[settings.captioner_name].captions(dataset, concept, settings, progress)
    texts = dict(zip((image.file for image in concept.pictures), captions, strict=True))
    images = []
    total = len(manifest.pictures)
    with Workers() as workers:
        for done, image in enumerate(manifest.pictures, start=1):
            text = texts.get(image.file, image.caption)
            if len(text) > MAX_CAPTION:
                raise DataError(
                    f"the caption has {len(text)} characters with the trigger",
                    where=image.source,
                    allowed=f"{MAX_CAPTION}",
                    remedy="shorten it",
                )
            images.append(image.model_copy(update={"caption": text}))
            for file in image.files:
                workers.run(_copy, dataset / file, out / file)
            progress(done, total, {})
    # A step without a trigger keeps the trigger of an earlier step.
    words = {name: getattr(settings, name) or getattr(manifest, name) for name in PLACEHOLDERS}
    result = manifest.model_copy(update={"pictures": tuple(images), **words})
    result.save(out)
    return result


def _copy(source: Path, target: Path) -> None:
    atomic_write(target, source.read_bytes())


def render_template(settings: CaptionSettings) -> str:
    """Returns the template with its placeholders filled in; a placeholder without a value is removed.

    Raises:
        SettingsError: The template has placeholders, and none of them has a value.
    """
    words = {name: getattr(settings, name) or "" for name in PLACEHOLDERS}
    placeholders = settings.placeholders()
    if placeholders and not any(words[name] for name in placeholders):
        raise SettingsError(
            f"the template {settings.template!r} has no {' and no '.join(placeholders)} to fill in",
            remedy="set a trigger or a class word, or add a .txt file with a caption for each image",
        )
    return clean_text(settings.template.format(**words))


def holds_word(text: str, word: str) -> bool:
    """Returns True if the text contains the word as a whole word, ignoring case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
