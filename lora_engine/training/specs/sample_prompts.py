"""Parses prompts with options, in the syntax of sd-scripts: `a ring --w 512 --h 768 --n blurry --s 28 --l 7.5 --d 1`.

Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_engine.bases.samplers import SAMPLERS, find_sampler
from lora_engine.errors import SettingsError

_OPTION = re.compile(r"(?:^|\s)--([a-zA-Z]\w*)(?=\s|$)")
_MAX_SIDE, _MAX_STEPS, _MAX_GUIDANCE = 4096, 1000, 50.0


@dataclass(frozen=True)
class SampleRequest:
    """One sample image.

    Attributes:
        number: Number of its prompt, from 0.
        text: The prompt without options.
        seed: Seed of the noise.
        steps: Sampler steps.
        guidance: Classifier-free guidance.
        negative: Negative prompt.
        width: In pixels; None takes the base's default.
        height: In pixels; None takes the base's default.
        sampler: Name of a sampler; None takes the base's default.
    """

    number: int
    text: str
    seed: int
    steps: int
    guidance: float
    negative: str = ""
    width: int | None = None
    height: int | None = None
    sampler: str | None = None

    @property
    def settings(self) -> tuple[Any, ...]:
        """Everything that the images of one batch share."""
        return self.steps, self.guidance, self.negative, self.width, self.height, self.sampler


def _side(text: str) -> int:
    value = int(text)
    if not 8 <= value <= _MAX_SIDE or value % 8:
        raise ValueError
    return value


def _steps(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MAX_STEPS:
        raise ValueError
    return value


def _guidance(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0.0 <= value <= _MAX_GUIDANCE):
        raise ValueError
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise ValueError
    return value


def _sampler(text: str) -> str:
    try:
        find_sampler(text)
    except SettingsError as error:
        raise ValueError from error
    return text


PROMPT_OPTIONS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "w": ("width", _side, f"a multiple of 8 from 8 to {_MAX_SIDE}"),
    "h": ("height", _side, f"a multiple of 8 from 8 to {_MAX_SIDE}"),
    "n": ("negative", str, "text"),
    "s": ("steps", _steps, f"1 to {_MAX_STEPS}"),
    "l": ("guidance", _guidance, f"0 to {_MAX_GUIDANCE:g}"),
    "d": ("seed", _seed, "an integer from 0"),
    "ss": ("sampler", _sampler, f"{', '.join(SAMPLERS)}, or their names in A1111 or diffusers"),
}
"""Option -> its field of `SampleRequest`, its reader, and what is allowed."""


def read_prompt(prompt: str, plain: SampleRequest) -> SampleRequest:
    """Returns the request of a prompt; what it does not set is that of `plain`.

    Raises:
        ValueError: An option is unknown, set twice, or has no valid value, or there is no text.
    """
    matches = list(_OPTION.finditer(prompt))
    text = prompt[: matches[0].start()].strip() if matches else prompt
    changes: dict[str, Any] = {}
    for match, following in zip(matches, [*matches[1:], None], strict=False):
        option, value = match[1], prompt[match.end() : following.start() if following else None].strip()
        if option not in PROMPT_OPTIONS:
            known = ", ".join(f"--{name}" for name in PROMPT_OPTIONS)
            raise ValueError(f"prompt {prompt!r} has the unknown option '--{option}'; known are {known}")
        name, read, allowed = PROMPT_OPTIONS[option]
        if name in changes:
            raise ValueError(f"prompt {prompt!r} sets '--{option}' twice; remove one of them")
        try:
            changes[name] = read(value)
        except ValueError:
            raise ValueError(f"prompt {prompt!r}: --{option} is {value!r}; allowed: {allowed}") from None
    if not text:
        raise ValueError(f"prompt {prompt!r} has options only; write the text in front of them")
    return replace(plain, text=text, **changes)
