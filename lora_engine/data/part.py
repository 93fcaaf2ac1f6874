"""Defines `DatasetPart`: settings of the images of one dataset among several that are combined. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1.0)]
_Text = Annotated[str, Field(max_length=500)]


class DatasetPart(BaseModel):
    """Settings of the images of one dataset; those that are None are the training's.

    Attributes:
        weight: Weight of the loss of its images; that of others is 1.
        caption_dropout: Share of its captions that are emptied.
        shuffle: Shuffles the tags of its captions each time.
        keep_tokens: Number of leading tags that are neither moved nor dropped.
        tag_dropout: Share of the other tags that are dropped.
        prefix: Prepended to its captions unchanged.
        suffix: Appended to its captions unchanged.
        flip: Mirrors its images left to right half of the time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=1.0, ge=0.0, le=1000.0, allow_inf_nan=False)
    caption_dropout: _Share | None = None
    shuffle: bool | None = None
    keep_tokens: int | None = Field(default=None, ge=0, le=1000)
    tag_dropout: _Share | None = None
    prefix: _Text | None = None
    suffix: _Text | None = None
    flip: bool | None = None

    def of_captions(self) -> dict[str, bool | int | float | str]:
        """Returns the settings of the step's `captions` that it replaces."""
        return self.model_dump(exclude={"weight", "caption_dropout"}, exclude_none=True)
