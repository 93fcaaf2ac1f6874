"""The prompt syntax of the field: `a red zorb <lora:name:0.7>` names an adapter and its weight. Torch-free."""

from __future__ import annotations

import math
import re

from lora_engine.errors import SettingsError

_TAG = re.compile(r"<lora:([^<>]*)>")


def parse_prompt(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """Splits a prompt into its words and the adapters that it names.

    Args:
        prompt: Text with any number of `<lora:REF>` or `<lora:REF:WEIGHT>`; REF is a file or `name@version`.

    Returns:
        The text without the tags, and (REF, weight) in the order of the prompt; the weight is 1 where none is given.

    Raises:
        SettingsError: A tag without a name, or with a weight that is no finite number.
    """
    named = [_parse_tag(match[1]) for match in _TAG.finditer(prompt)]
    text = " ".join(_TAG.sub(" ", prompt).split())
    if "<lora:" in text:
        raise SettingsError(f"{prompt!r} has an open tag", allowed="<lora:NAME@REF:WEIGHT>", remedy="close it with '>'")
    return text, named


def _parse_tag(tag: str) -> tuple[str, float]:
    ref, colon, weight = tag.rpartition(":")
    if not colon:
        ref, weight = tag, "1"
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not ref.strip() or not math.isfinite(value):
        raise SettingsError(
            f"<lora:{tag}>", allowed="<lora:NAME@REF:WEIGHT> with a finite weight, such as <lora:zorb@production:0.7>"
        )
    return ref.strip(), value
