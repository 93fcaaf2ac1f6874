"""What a person may set about data: ingest, preprocess, caption. Torch-free; the work lives beside this file."""

from __future__ import annotations

import re
import string
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PLACEHOLDERS = ("trigger", "class_word")


class IngestSettings(BaseModel):
    """How a folder of pictures becomes a manifest.

    Attributes:
        heldout: Fraction of the pictures that is never trained on, chosen by digest order: the same pictures give the
            same choice on every machine. Above 0, at least one is held out and at least one is left to train on.
        max_pixels: A picture with more is quarantined before it is decoded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    heldout: float = Field(default=0.0, ge=0.0, le=0.9)
    max_pixels: int = Field(default=64_000_000, ge=1, le=89_000_000)


class PreprocessSettings(BaseModel):
    """How pictures become squares of one size.

    Attributes:
        resolution: Width and height in pixels, a multiple of 8.
        crop: Which part of a picture that is not square is kept: its centre, or the window with the most contrast.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(ge=16, le=4096, multiple_of=8)
    crop: Literal["center", "salient"] = "center"


class CaptionSettings(BaseModel):
    """Where the captions come from.

    Attributes:
        captioner: `files`: the .txt beside each picture, and the template where there is none; `template`: the template
            for all; `interrogator`: read from the pictures by the embedded CLIP (drawings of the embedded world).
        trigger: The word that will stand for the concept; one word.
        class_word: What the concept is an instance of ("star").
        template: Text with `{trigger}` and `{class_word}`; a part without a value is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    captioner: Literal["files", "template", "interrogator"] = "files"
    trigger: str | None = None
    class_word: str | None = None
    template: str = Field(default="a {trigger} {class_word}", min_length=1, max_length=500)

    @field_validator("trigger")
    @classmethod
    def _trigger_is_one_word(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^\s<>:{}\x00-\x1f\x7f-\x9f]{1,64}", value):
            raise ValueError(f"trigger {value!r} must be one word of 1 to 64 characters without spaces, < > : {{ }}")
        return value

    @field_validator("class_word")
    @classmethod
    def _class_word_is_plain(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"[^\s<>:{}\x00-\x1f\x7f-\x9f]+( [^\s<>:{}\x00-\x1f\x7f-\x9f]+)*", value
        ):
            raise ValueError(f"class_word {value!r} must be words with single spaces, without < > : {{ }}")
        return value

    @field_validator("template")
    @classmethod
    def _template_is_plain(cls, value: str) -> str:
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"template {value!r} is not well formed: {error}") from None
        for _, name, specification, conversion in parts:
            if name is not None and (name not in PLACEHOLDERS or specification or conversion):
                raise ValueError(f"template {value!r} may hold {{trigger}} and {{class_word}} only, not {{{name}}}")
        if any(not character.isprintable() for character in value):
            raise ValueError(f"template {value!r} must be one line without control characters")
        return value

    @model_validator(mode="after")
    def _trigger_has_a_place(self) -> CaptionSettings:
        if self.trigger is not None and self.captioner != "interrogator" and "trigger" not in self.asked_words():
            raise ValueError(f"template {self.template!r} has no {{trigger}}, so {self.trigger!r} could be left out")
        return self

    def asked_words(self) -> list[str]:
        """The placeholders that the template holds."""
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
