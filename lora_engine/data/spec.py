"""Defines the user-facing settings of ingest, preprocess and caption. Must not import torch."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lora_engine.data.captioners import CAPTIONERS, captioner_setting
from lora_engine.data.edits import Edit
from lora_engine.data.manifest import MAX_REPEATS
from lora_engine.data.preparation_spec import CropSetting, FileMask, MaskSetting, UpscaleSetting
from lora_engine.settings import AddedLater

if TYPE_CHECKING:
    CaptionerSetting = str | BaseModel
else:
    CaptionerSetting = captioner_setting()

PLACEHOLDERS = ("trigger", "class_word")


class IngestSettings(BaseModel):
    """The settings of ingest.

    Attributes:
        heldout: Fraction of the images that is never trained on, chosen by digest order: the same images give the same
            choice on every machine. Above 0, at least one is held out and at least one is trained on.
        max_pixels: Largest number of pixels of an image; larger ones are quarantined before decoding.
        repeats: Repeats of an image per epoch: numbers by name or pattern (`close-up.png`, `faces/*`), where the last
            match wins; or `folders`, as in kohya's scripts: images below a folder `10_name` have 10 repeats, and the
            innermost such folder wins. The default is 1, or the number of kohya's folders if `layout` finds them.
        layout: `auto` recognizes the dataset files of OneTrainer (`concepts.json`), ai-toolkit (`ai-toolkit.yaml`) and
            SimpleTuner (`multidatabackend.json`); the splits of Hugging Face's datasets, of which all but `train` are
            held out; and kohya's folders if all images are in folders `N_words`: their numbers are repeats, their
            words captions of images without another, and folders below `reg`, or with the last words of another
            folder, hold class images. The name of one requires it; `plain` gives names no meaning.
        alpha: `composite` shows the background where an image is transparent; `mask` also makes its opacity the mask of
            an image without another.
        background: Color behind transparent images, as `#rrggbb`.
        several_captions: What several captions of an image are: the lines of a text file, members of a list, keys of a
            JSON object, rows of a table. `auto` joins the lines of a file to one caption, or takes the first line where
            a dataset file says that lines are alternatives, and the first of a list in a table; `first` takes the first
            always; `draw` keeps all, and a training draws one each time that it uses the image.
        generated: What happens to images that their metadata or their owner call generated: `allow`, `warn`, or
            `refuse`, which quarantines them.
        c2pa: `recognize` records that an image has a C2PA manifest; `verify` also whether its signature is valid, which
            needs the extra `c2pa`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    heldout: float = Field(default=0.0, ge=0.0, le=0.9)
    max_pixels: int = Field(default=64_000_000, ge=1, le=89_000_000)
    repeats: (
        Literal["folders"] | dict[Annotated[str, Field(max_length=1_000)], Annotated[int, Field(ge=1, le=MAX_REPEATS)]]
    ) = {}
    layout: Annotated[
        Literal["auto", "plain", "kohya", "huggingface", "onetrainer", "ai-toolkit", "simpletuner"], AddedLater()
    ] = "auto"
    alpha: Annotated[Literal["composite", "mask"], AddedLater()] = "composite"
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$"), AddedLater()] = "#ffffff"
    generated: Annotated[Literal["allow", "warn", "refuse"], AddedLater()] = "allow"
    c2pa: Annotated[Literal["recognize", "verify"], AddedLater()] = "recognize"
    several_captions: Annotated[Literal["auto", "first", "draw"], AddedLater()] = "auto"

    @property
    def background_color(self) -> tuple[int, int, int]:
        """Returns red, green and blue of the background, 0 to 255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue


class Buckets(BaseModel):
    """The settings of aspect-ratio buckets; see `data/buckets.py`.

    Attributes:
        step: Sides are multiples of this number of pixels, which is a multiple of 8.
        min_side: Shortest side in pixels, a multiple of the step; None is half of the resolution, in whole steps.
        max_side: Longest side in pixels, a multiple of the step; None is twice the resolution, in whole steps.
        enlarge: Largest factor of enlargement. A smaller image gets a smaller size; it is quarantined if that is below
            `min_side`.
        keep: Crop for an image whose shape differs from its bucket: the center, or the window with the most contrast.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(default=64, ge=8, le=512, multiple_of=8)
    min_side: int | None = Field(default=None, ge=8, le=4096)
    max_side: int | None = Field(default=None, ge=8, le=8192)
    enlarge: float = Field(default=2.0, ge=1.0, le=64.0, allow_inf_nan=False)
    keep: Literal["center", "salient"] = "center"

    def sides(self, resolution: int) -> tuple[int, int]:
        """Returns the shortest and the longest side in pixels."""
        low = self.min_side or max(1, resolution // 2 // self.step) * self.step
        high = self.max_side or resolution * 2 // self.step * self.step
        return low, high


class PreprocessSettings(BaseModel):
    """The settings of preprocess.

    Attributes:
        resolution: Width and height in pixels, a multiple of 8; for buckets, the side of the square of largest area.
        crop: Part of an image that is kept: its center square, the square with the most contrast, a `random` square,
            that around the `subject` of the mask or around the `face`, or `bucket`: nearly all of it, in the bucket of
            the nearest shape.
        buckets: Settings for `crop: bucket`; None takes the defaults of `Buckets`.
        original_sizes: True records the original's size and the offset of the crop for each image, which the network of
            SDXL reads. The default is True in a pipeline with such a base, and False in others.
        enlarge: Largest factor of enlargement to a square; a smaller image is quarantined. None takes the default of
            `Buckets`, which have their own.
        upscale: What enlarges images: `bicubic` or `lanczos` interpolation, or a model, `swin2sr`.
        mask: What the loss of a training with `mask` weights: the masks of the dataset, or masks that are made here of
            faces, of a text, or of all but the background.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(ge=16, le=4096, multiple_of=8)
    crop: CropSetting = "center"
    buckets: Buckets | None = None
    original_sizes: Annotated[bool, AddedLater()] = False
    enlarge: Annotated[float | None, Field(ge=1.0, le=64.0, allow_inf_nan=False), AddedLater()] = None
    upscale: Annotated[UpscaleSetting, AddedLater()] = "bicubic"
    mask: Annotated[MaskSetting, AddedLater()] = FileMask()

    @model_validator(mode="after")
    def _buckets_can_be_used(self) -> PreprocessSettings:
        if self.crop != "bucket":
            if self.buckets is not None:
                raise ValueError(f"buckets belongs to crop 'bucket', not to {self.crop_name!r}; leave it out")
            return self
        if self.enlarge is not None:
            raise ValueError("enlarge belongs to squares; set buckets.enlarge for crop 'bucket'")
        chosen = self.buckets or Buckets()
        for name in ("min_side", "max_side"):
            side = getattr(chosen, name)
            if side is not None and side % chosen.step:
                raise ValueError(f"{name} {side} is not a multiple of step {chosen.step}")
        low, high = chosen.sides(self.resolution)
        if not low <= self.resolution <= high:
            raise ValueError(
                f"no size is possible: sides range from {low} to {high} in steps of {chosen.step}, and resolution is "
                f"{self.resolution}; set step to at most {self.resolution}, min_side below and max_side above it"
            )
        return self

    def models(self) -> dict[str, str]:
        """Returns setting -> hub id or folder of its model."""
        named = ((role, getattr(getattr(self, role), "model", None)) for role in ("mask", "upscale"))
        return {role: model for role, model in named if model is not None}

    @property
    def crop_name(self) -> str:
        """Returns the name of the crop."""
        return self.crop if isinstance(self.crop, str) else self.crop.name

    @property
    def kept_part(self) -> str:
        """Returns the name of the crop after the resize, one of `CROPS`; windows are cropped before it."""
        if self.crop == "bucket":
            return (self.buckets or Buckets()).keep
        return self.crop if isinstance(self.crop, str) else "center"

    @property
    def largest_scale(self) -> float:
        """Returns the largest factor of enlargement to a square."""
        return Buckets().enlarge if self.enlarge is None else self.enlarge


class CaptionChecks(BaseModel):
    """What captions are checked against, beside their texts.

    Attributes:
        base: The base whose tokenizers read trigger and captions; None checks neither.
        clip: Folder of a CLIP that compares captions with their images; None does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = Field(default=None, min_length=1, max_length=1000)
    clip: str | None = Field(default=None, min_length=1, max_length=1000)


class CaptionSettings(BaseModel):
    """The settings of caption.

    Attributes:
        captioner: Source of the captions by name, or by name and options; see `CAPTIONERS`.
        trigger: The word for the concept; a single word. None means none.
        class_word: The class of the concept ("star"). None means none.
        template: Text with `{trigger}` and `{class_word}`; a placeholder without a value is removed.
        existing: What a captioner that looks at images does where a caption exists: `keep` it without looking,
            `replace` it, or `append` its own after it. It is always appended to the words of kohya's folders.
        edits: Edits of all captions, in this order; see `lora_engine.data.edits`. Captions without
            the trigger get it afterwards.
        check: What captions are checked against; their texts are checked if a captioner looks at images, if there are
            edits, or if this is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    captioner: CaptionerSetting = "files"
    trigger: str | None = None
    class_word: str | None = None
    template: str = Field(default="a {trigger} {class_word}", min_length=1, max_length=500)
    existing: Annotated[Literal["keep", "replace", "append"], AddedLater()] = "keep"
    edits: Annotated[tuple[Edit, ...], AddedLater(), Field(max_length=200)] = ()
    check: Annotated[CaptionChecks | None, AddedLater()] = None

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
    def _template_has_trigger(self) -> CaptionSettings:
        adds_trigger = CAPTIONERS[self.captioner_name].adds_trigger
        if self.trigger is not None and not adds_trigger and "trigger" not in self.placeholders():
            raise ValueError(f"template {self.template!r} has no {{trigger}}, so captions could lack {self.trigger!r}")
        return self

    @model_validator(mode="after")
    def _existing_belongs_to_describers(self) -> CaptionSettings:
        if self.existing != "keep" and not CAPTIONERS[self.captioner_name].describe:
            raise ValueError(
                f"existing {self.existing!r} belongs to captioners that look at images, not to {self.captioner_name!r}"
            )
        return self

    @property
    def is_reported(self) -> bool:
        """Returns True if the captions are checked and reported: a model wrote them, or edits or checks are set."""
        return bool(CAPTIONERS[self.captioner_name].describe or self.edits or self.check)

    def models(self) -> dict[str, tuple[str, str]]:
        """Returns role -> (name of a model, `module:function` that finds it) of the captioner."""
        find = CAPTIONERS[self.captioner_name].models
        return dict(find(self.captioner)) if find is not None else {}

    @property
    def captioner_name(self) -> str:
        """Returns the name of the captioner."""
        return self.captioner if isinstance(self.captioner, str) else str(self.captioner.model_dump()["name"])

    def placeholders(self) -> list[str]:
        """Returns the placeholders of the template."""
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
