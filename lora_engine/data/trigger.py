"""Adds the trigger to captions: by the template, which trigger and class word fill in. Must not import torch."""

from __future__ import annotations

import re

from lora_engine.data.captioners import CAPTIONERS
from lora_engine.data.spec import PLACEHOLDERS, CaptionSettings
from lora_engine.data.text_files import clean_text
from lora_engine.errors import SettingsError


def add_trigger(text: str, settings: CaptionSettings) -> str:
    """Returns a caption with the trigger: itself, after the filled template if it lacks it, or the template if empty.

    An empty caption of a model stays empty if the template has no word to fill in; a check finds it.

    Raises:
        SettingsError: The caption is empty, and the template has no word to fill in.
    """
    if not text:
        is_described = bool(CAPTIONERS[settings.captioner_name].describe)
        return "" if is_described and not (settings.trigger or settings.class_word) else render_template(settings)
    if settings.trigger is None or holds_word(text, settings.trigger):
        return text
    # The caption must contain the trigger, or training would not learn it.
    return f"{render_template(settings)}, {text}"


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
    return re.search(whole_word(word), text, re.IGNORECASE) is not None


def whole_word(word: str) -> str:
    """Returns the pattern of a word that is no part of a longer one."""
    return rf"(?<!\w){re.escape(word)}(?!\w)"
