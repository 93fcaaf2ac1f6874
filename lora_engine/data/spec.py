"""What a person may set about data: ingest, preprocess, caption. Torch-free; the work lives beside this file."""

from __future__ import annotations

import re
import string
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lora_engine.data.manifest import MAX_REPEATS

PLACEHOLDERS = ("trigger", "class_word")


class IngestSettings(BaseModel):
    """How a folder of pictures becomes a manifest.

    Attributes:
        heldout: Fraction of the pictures that is never trained on, chosen by digest order: the same pictures give the
            same choice on every machine. Above 0, at least one is held out and at least one is left to train on.
        max_pixels: A picture with more is quarantined before it is decoded.
        repeats: How often a picture comes up in training for once of another: a number by name or pattern of names
            (`close-up.png`, `faces/*`), of which the last that fits counts; or `folders`, as in kohya's scripts: the
            pictures below a folder `10_name` count 10 times, with the number of the innermost folder that has one.
            By default every picture counts once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    heldout: float = Field(default=0.0, ge=0.0, le=0.9)
    max_pixels: int = Field(default=64_000_000, ge=1, le=89_000_000)
    repeats: Literal["folders"] | dict[str, Annotated[int, Field(ge=1, le=MAX_REPEATS)]] = {}


class Buckets(BaseModel):
    """Which sizes pictures of different shapes may get; see `data/buckets.py`.

    Attributes:
        step: Sides are multiples of this many pixels; a multiple of 8.
        min_side: The shortest side in pixels, a multiple of the step; None is half of the resolution, in whole steps.
        max_side: The longest side in pixels, a multiple of the step; None is twice the resolution, in whole steps.
        enlarge: A picture is enlarged by at most this factor. A smaller one goes into a smaller size, and where that
            would be below `min_side` it is quarantined.
        keep: What is kept where the picture's shape is not quite that of its bucket: the centre, or the window with the
            most contrast.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(default=64, ge=8, le=512, multiple_of=8)
    min_side: int | None = Field(default=None, ge=8, le=4096)
    max_side: int | None = Field(default=None, ge=8, le=8192)
    enlarge: float = Field(default=2.0, ge=1.0, le=64.0, allow_inf_nan=False)
    keep: Literal["center", "salient"] = "center"

    def sides(self, resolution: int) -> tuple[int, int]:
        """The shortest and the longest side, in pixels."""
        low = self.min_side or max(1, resolution // 2 // self.step) * self.step
        high = self.max_side or resolution * 2 // self.step * self.step
        return low, high


class PreprocessSettings(BaseModel):
    """How pictures get the sizes that they are trained in.

    Attributes:
        resolution: Width and height in pixels, a multiple of 8; for buckets, the side of the square of largest area.
        crop: Which part of a picture that is not square is kept: its centre, or the window with the most contrast; or
            `bucket`: (almost) all of it, in the size of `buckets` that is nearest in shape.
        buckets: Of `crop: bucket`; None takes the defaults of `Buckets`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(ge=16, le=4096, multiple_of=8)
    crop: Literal["center", "salient", "bucket"] = "center"
    buckets: Buckets | None = None

    @model_validator(mode="after")
    def _buckets_can_be_used(self) -> PreprocessSettings:
        if self.crop != "bucket":
            if self.buckets is not None:
                raise ValueError(f"buckets belongs to crop 'bucket', not to {self.crop!r}; leave it out")
            return self
        chosen = self.buckets or Buckets()
        for name in ("min_side", "max_side"):
            side = getattr(chosen, name)
            if side is not None and side % chosen.step:
                raise ValueError(f"{name} {side} is not a multiple of step {chosen.step}")
        low, high = chosen.sides(self.resolution)
        if not low <= self.resolution <= high:
            raise ValueError(
                f"no size fits: sides go from {low} to {high} in steps of {chosen.step}, and resolution is "
                f"{self.resolution}; set step to at most {self.resolution}, min_side below and max_side above it"
            )
        return self


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
