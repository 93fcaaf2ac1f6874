"""Reads prompt files and removes the trigger from prompts. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from lora_engine.data.manifest import MAX_CAPTION
from lora_engine.data.text_files import clean_text
from lora_engine.data.trigger import holds_word
from lora_engine.errors import DataError

MAX_PROMPTS = 1_000


def remove_trigger(prompt: str, trigger: str | None, class_word: str | None) -> str:
    """Replaces the trigger by the class word; removes it if the class word is unknown or already in the prompt.

    >>> remove_trigger("a red zorb on the left", "zorb", "star")
    'a red star on the left'
    >>> remove_trigger("a sks star", "sks", "star")
    'a star'
    """
    if trigger is None:
        return prompt
    pattern = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)
    bare = " ".join(pattern.sub(" ", prompt).split())
    if class_word is None or holds_word(bare, class_word):
        return re.sub(r"\s+(?=[,.;!?])", "", bare)
    return pattern.sub(lambda _: class_word, prompt)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Reads the prompts of a text file: one per line; empty lines and lines that start with # are skipped.

    Raises:
        DataError: The file is missing, not UTF-8, or has no prompt, too many or too long ones.
    """
    where = str(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"the prompts cannot be read ({error.strerror})", where=where) from None
    except UnicodeDecodeError:
        raise DataError("the prompts are not UTF-8 text", where=where, remedy="save the file as UTF-8") from None
    cleaned = ((number, clean_text(line)) for number, line in enumerate(lines, start=1))
    prompts = [(number, text) for number, text in cleaned if text and not text.startswith("#")]
    for number, text in prompts:
        if len(text) > MAX_CAPTION:
            raise DataError(f"line {number} has {len(text)} characters", where=where, allowed=f"{MAX_CAPTION}")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise DataError(f"has {len(prompts)} prompts", where=where, allowed=f"1 to {MAX_PROMPTS}, one per line")
    return tuple(text for _, text in prompts)
