"""Caption: every picture of a dataset gets its final text, with the trigger in it where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lora_engine.data.folder import clean_text
from lora_engine.data.manifest import MAX_CAPTION, ImageEntry, Manifest
from lora_engine.data.spec import PLACEHOLDERS, CaptionSettings
from lora_engine.errors import DataError, SettingsError
from lora_engine.files import atomic_write
from lora_engine.progress import Progress

Captioner = Callable[[Path, Manifest, CaptionSettings, Progress | None], list[str]]


def caption(dataset: Path, out: Path, settings: CaptionSettings, progress: Progress | None = None) -> Manifest:
    """Writes the dataset again with captions; the manifest records trigger and class word.

    Raises:
        DataError: The dataset is not whole, or a caption becomes too long.
        SettingsError: Images without a caption, and neither trigger nor class word to make one from.
    """
    manifest = Manifest.load(dataset)
    captions = _CAPTIONERS[settings.captioner](dataset, manifest, settings, progress)
    pictures = []
    for picture, text in zip(manifest.pictures, captions, strict=True):
        if len(text) > MAX_CAPTION:
            raise DataError(
                f"the caption has {len(text)} characters with the trigger",
                where=picture.source,
                allowed=f"{MAX_CAPTION}",
                remedy="shorten it",
            )
        for file in picture.files:
            atomic_write(out / file, (dataset / file).read_bytes())
        pictures.append(picture.model_copy(update={"caption": text}))
    # A later step that names no trigger does not take away the one that an earlier one set.
    words = {name: getattr(settings, name) or getattr(manifest, name) for name in PLACEHOLDERS}
    result = manifest.model_copy(update={"pictures": tuple(pictures), **words})
    result.save(out)
    return result


def render_template(settings: CaptionSettings) -> str:
    """The template with its words filled in; a part without a value is left out.

    Raises:
        SettingsError: It asks for words and has none of them.
    """
    words = {name: getattr(settings, name) or "" for name in PLACEHOLDERS}
    asked = settings.asked_words()
    if asked and not any(words[name] for name in asked):
        raise SettingsError(
            f"the template {settings.template!r} has no {' and no '.join(asked)} to fill in",
            remedy="set a trigger or a class word, or put a .txt with a caption beside each picture",
        )
    return clean_text(settings.template.format(**words))


def holds_word(text: str, word: str) -> bool:
    """Whether the word occurs in the text as a whole word, in whatever case (as tokenizers see it)."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _from_files(_dataset: Path, manifest: Manifest, settings: CaptionSettings, _: Progress | None) -> list[str]:
    return [_own_or_template(picture, settings) for picture in manifest.pictures]


def _own_or_template(picture: ImageEntry, settings: CaptionSettings) -> str:
    if not picture.caption:
        return render_template(settings)
    if settings.trigger is None or holds_word(picture.caption, settings.trigger):
        return picture.caption
    # Without the trigger in the text nothing would be tied to it: the template goes in front.
    return f"{render_template(settings)}, {picture.caption}"


def _from_template(_dataset: Path, manifest: Manifest, settings: CaptionSettings, _: Progress | None) -> list[str]:
    return [render_template(settings)] * len(manifest.pictures)


def _from_interrogator(
    dataset: Path, manifest: Manifest, settings: CaptionSettings, progress: Progress | None
) -> list[str]:
    # Imports torch and CLIP; the other captioners do without.
    from lora_engine.data.interrogator import interrogate

    return interrogate([dataset / picture.file for picture in manifest.pictures], settings, progress)


_CAPTIONERS: dict[str, Captioner] = {
    "files": _from_files,
    "template": _from_template,
    "interrogator": _from_interrogator,
}
