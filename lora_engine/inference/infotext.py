"""Reads A1111's infotext: the prompt, the negative prompt, and a last line of settings. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from lora_engine.documents import parse_json
from lora_engine.errors import DataError
from lora_engine.inference.prompts.prompt import MAX_LENGTH

MAX_INFOTEXT = 2 * MAX_LENGTH
"""Characters of an infotext."""
_PAIR = re.compile(r'(\w[\w \-/]{0,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LEAST_PAIRS = 3
"""Pairs that make the last line one of settings, as in A1111."""
_NEGATIVE = "Negative prompt:"


@dataclass(frozen=True)
class Infotext:
    """The parts of an infotext.

    Attributes:
        prompt: The prompt.
        negative: The negative prompt.
        values: The settings by A1111's keys, such as `CFG scale`.
    """

    prompt: str
    negative: str
    values: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a text. A last line with fewer than three pairs belongs to the prompt.

        Raises:
            DataError: The text is too long.
        """
        if len(text) > MAX_INFOTEXT:
            raise DataError(f"the text `parameters` has {len(text)} characters", allowed=f"at most {MAX_INFOTEXT}")
        *lines, last = text.strip().split("\n")
        pairs = dict(_PAIR.findall(last))
        if len(pairs) < _LEAST_PAIRS:
            lines, pairs = [*lines, last], {}
        lines = [line.strip() for line in lines]
        first = next((number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
        negative = "\n".join(lines[first:]).removeprefix(_NEGATIVE).strip()
        values = {key: _unquoted(value.strip()) for key, value in pairs.items()}
        return cls("\n".join(lines[:first]).strip(), negative, values)


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        read = parse_json(value, "text `parameters`", DataError)
    except DataError:
        return value
    return read if isinstance(read, str) else value
