"""Reads A1111's infotext, the text `parameters` of an image, and fills the fields that a request leaves unset."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_engine.errors import SettingsError
from lora_engine.inference.infotext import Infotext

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


def infotext_values(text: str) -> dict[str, str]:
    """Returns the settings of an infotext, with the keys `Prompt` and `Negative prompt` for its texts.

    A size `WxH` becomes `KEY-1` and `KEY-2`, as in A1111.

    Raises:
        DataError: The text is too long.
    """
    infotext = Infotext.parse(text)
    settings = {"Prompt": infotext.prompt, "Negative prompt": infotext.negative}
    for key, value in infotext.values.items():
        size = _SIZE.fullmatch(value)
        settings |= {key: value} if size is None else {f"{key}-1": size[1], f"{key}-2": size[2]}
    return settings


def fill_unset(values: Mapping[str, Any], infotext: str) -> dict[str, Any]:
    """Returns the fields of a request, with those of its infotext where the request has none.

    Args:
        values: The fields that the request sets.
        infotext: The text.

    Raises:
        SettingsError: A setting of the text is no number.
    """
    settings = infotext_values(infotext)
    filled: dict[str, Any] = {}
    for key, (field, kind) in _FIELDS.items():
        if key not in settings or (field in values and values[field] is not None):
            continue
        try:
            filled[field] = kind(settings[key])
        except ValueError:
            raise SettingsError(f"{key} is {settings[key][:40]!r}", where="infotext", allowed="a number") from None
    if "sampler_name" in filled and values.get("sampler_index") is not None:
        del filled["sampler_name"]
    overrides = values.get("override_settings", {})
    if isinstance(overrides, dict) and "Clip skip" in settings:
        filled["override_settings"] = {"CLIP_stop_at_last_layers": settings["Clip skip"], **overrides}
    if "enable_hr" not in values and {"Hires upscale", "Hires upscaler"} & settings.keys():
        filled["enable_hr"] = True
    return {**values, **filled}


_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "Prompt": ("prompt", str),
    "Negative prompt": ("negative_prompt", str),
    "Steps": ("steps", int),
    "Sampler": ("sampler_name", str),
    "Schedule type": ("scheduler", str),
    "CFG scale": ("cfg_scale", float),
    "Seed": ("seed", int),
    "Variation seed": ("subseed", int),
    "Variation seed strength": ("subseed_strength", float),
    "Seed resize from-1": ("seed_resize_from_w", int),
    "Seed resize from-2": ("seed_resize_from_h", int),
    "Size-1": ("width", int),
    "Size-2": ("height", int),
    "Denoising strength": ("denoising_strength", float),
    "Hires upscale": ("hr_scale", float),
    "Hires upscaler": ("hr_upscaler", str),
    "Hires steps": ("hr_second_pass_steps", int),
    "Mask blur": ("mask_blur", float),
}
"""Key of the text -> field, and how it is read."""
