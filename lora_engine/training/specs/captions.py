"""What happens to captions and pictures on their way into a batch. Torch-free; `training.captions` and `looks` work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1.0)]
_Strength = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=0.9)]
_Text = Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Choices = Annotated[tuple[_Text, ...], Field(min_length=1, max_length=1000)]


class Colours(BaseModel):
    """Colour jitter out of a fixed number of variants, each of them encoded once and kept.

    A jitter that is drawn anew in every step would have to encode every picture in every step; that is refused.

    Attributes:
        variants: How many there are of each picture beside the picture as it is; they come up alike.
        brightness: Factor of 1 - x to 1 + x on the values.
        contrast: The same on the distance from the picture's mean grey.
        saturation: The same on the distance of the colours from grey.
        hue: Turn of the hue by up to so much of a full circle, either way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variants: int = Field(ge=0, le=64)
    brightness: _Strength = 0.1
    contrast: _Strength = 0.1
    saturation: _Strength = 0.1
    hue: Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=0.5)] = 0.0

    @model_validator(mode="after")
    def _latents_are_cached(self) -> Colours:
        if self.variants < 1:
            raise ValueError(
                "colours.variants is 0: a jitter drawn anew in each step cannot be had, since latents are cached; "
                "set variants to 1 or more, or leave colours out"
            )
        return self


class Captions(BaseModel):
    """How captions, and pictures, change from batch to batch; by default not at all.

    What is drawn is a function of the seed and the batch's number. It happens in the order of these attributes, to the
    person's pictures alone; class pictures keep their captions. `caption_dropout` comes after it.

    Attributes:
        wildcards: `{red|blue}` in a caption becomes one of its parts, drawn anew each time; they may be nested. Without
            it braces are text like any other.
        replacements: A piece of text in a caption to what may stand for it; one is drawn for all of its places.
        shuffle: Whether the tags come in another order each time.
        separator: What separates tags.
        keep_tokens: So many of the first tags stay where they are and are never dropped.
        tag_dropout: Share of the other tags that are left out.
        templates: Texts with `{}` where the caption goes, of which one is drawn; `object` and `style` are lists in the
            manner of textual inversion.
        prefix: Put before the result as it stands.
        suffix: Put behind the result as it stands.
        weights: `(word:1.3)`, `(word)` and `[word]` in a caption weigh its tokens, as in prompts; see
            `bases/long_text.py`. Without it brackets are text like any other.
        chunks: Chunks of 75 tokens that are read of every text; what is longer is cut off. More than 1, and weights,
            are for bases whose text encoders are all CLIP (SD 1 and 2, SDXL).
        flip: Half of the times a picture is mirrored, left to right; not for captions that tell left from right.
        colours: Colour jitter; None has none.
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
    colours: Colours | None = None

    @model_validator(mode="after")
    def _templates_have_one_place(self) -> Captions:
        for template in self.templates if isinstance(self.templates, tuple) else ():
            if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
                raise ValueError(
                    f"template {template!r} must hold {{}} once, where the caption goes, and no other brace"
                )
        return self
