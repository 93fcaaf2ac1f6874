"""Settings of caption and image augmentation. Torch-free; `training.captions` and `augmentations` apply them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_engine.settings import AddedLater

_Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1.0)]
_Strength = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=0.9)]
_Text = Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Separator = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Choices = Annotated[tuple[_Text, ...], Field(min_length=1, max_length=1000)]


class ColorJitter(BaseModel):
    """Color jitter with a fixed number of variants. Each variant is encoded once and cached.

    A jitter drawn anew in every step would have to encode every image in every step. It is refused.

    Attributes:
        variants: Number of variants of each image beside the original; all are equally likely.
        brightness: Factor on the values, drawn from 1 - x to 1 + x.
        contrast: Factor on the distance from the image's mean gray, drawn from the same range.
        saturation: Factor on the distance of the colors from gray, drawn from the same range.
        hue: Largest hue rotation in either direction; share of a full circle.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variants: int = Field(ge=0, le=64)
    brightness: _Strength = 0.1
    contrast: _Strength = 0.1
    saturation: _Strength = 0.1
    hue: Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=0.5)] = 0.0

    @model_validator(mode="after")
    def _latents_are_cached(self) -> ColorJitter:
        if self.variants < 1:
            raise ValueError(
                "colours.variants is 0: latents are cached, so a jitter drawn anew in each step is not supported; "
                "set variants to 1 or more, or leave colours out"
            )
        return self


class Captions(BaseModel):
    """How captions and images are augmented from batch to batch; by default not at all.

    The draws are functions of the seed and the batch number. Attributes apply in this order, to the user's images only.
    Class images keep their captions. `caption_dropout` applies last.

    Attributes:
        wildcards: Replaces `{red|blue}` in a caption by one of its parts, drawn anew each time; nesting is allowed.
            False keeps braces as text.
        replacements: Text in a caption to its alternatives; one is drawn and replaces every occurrence.
        shuffle: Shuffles the tags each time.
        separator: Separator between tags.
        keep_tokens: Number of leading tags that are neither moved nor dropped.
        keep_separator: Text such as `|||` that ends the fixed part of a caption, and begins another one if it occurs
            twice: `a, b ||| c, d ||| e` moves and drops c and d only. It is removed. Captions without it have
            `keep_tokens`. None disables it.
        secondary_separator: Text such as `;;;` that joins tags into one until they are shuffled and dropped; then it
            becomes the separator. None disables it.
        tag_dropout: Share of the other tags that are dropped.
        tag_warmup: Steps of a phase in which the number of these tags rises from `first_tags` to all of them; 0
            disables it.
        first_tags: Number of these tags in the first step of `tag_warmup`.
        templates: Texts with `{}` for the caption, of which one is drawn; `object` and `style` are lists like those of
            textual inversion.
        prefix: Prepended to the result unchanged.
        suffix: Appended to the result unchanged.
        weights: Reads `(word:1.3)`, `(word)` and `[word]` in a caption as token weights, as in prompts; see
            `bases/long_text.py`. False keeps brackets as text.
        chunks: Number of 75-token chunks read of every text; the rest is truncated. More than 1, and weights, need a
            base whose text encoders are all CLIP (SD 1 and 2, SDXL).
        dropout_every: Empties the captions in every n-th epoch, epoch n first; 0 never does. An epoch is one pass
            over the images of a size, with their repeats.
        flip: Mirrors an image left to right half of the time; wrong for captions that tell left from right.
        colours: Color jitter; None disables it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    wildcards: bool = False
    replacements: dict[Annotated[str, Field(min_length=1, max_length=500)], _Choices] = {}
    shuffle: bool = False
    separator: Annotated[str, Field(min_length=1, max_length=16)] = ","
    keep_tokens: int = Field(default=0, ge=0, le=1000)
    tag_dropout: _Share = 0.0
    templates: Literal["object", "style"] | _Choices | None = None
    prefix: _Text = ""
    suffix: _Text = ""
    weights: bool = False
    chunks: int = Field(default=1, ge=1, le=16)
    flip: bool = False
    colours: ColorJitter | None = None
    keep_separator: Annotated[_Separator | None, AddedLater()] = None
    secondary_separator: Annotated[_Separator | None, AddedLater()] = None
    tag_warmup: Annotated[int, Field(ge=0, le=10_000_000), AddedLater()] = 0
    first_tags: Annotated[int, Field(ge=0, le=1000), AddedLater()] = 1
    dropout_every: Annotated[int, Field(ge=0, le=1_000_000), AddedLater()] = 0

    @model_validator(mode="after")
    def _separators_differ(self) -> Captions:
        separators = [s for s in (self.separator.strip(), self.keep_separator, self.secondary_separator) if s]
        if any(a in b for n, a in enumerate(separators) for m, b in enumerate(separators) if n != m):
            raise ValueError(
                f"the separators {', '.join(map(repr, separators))} contain each other; choose texts such as "
                "',', '|||' and ';;;'"
            )
        return self

    @model_validator(mode="after")
    def _first_tags_are_of_a_warmup(self) -> Captions:
        if self.first_tags != 1 and not self.tag_warmup:
            raise ValueError(f"first_tags {self.first_tags} is of the tag warmup, which is off; set tag_warmup")
        return self

    @model_validator(mode="after")
    def _templates_have_one_slot(self) -> Captions:
        for template in self.templates if isinstance(self.templates, tuple) else ():
            if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
                raise ValueError(f"template {template!r} must contain {{}} once, for the caption, and no other brace")
        return self
