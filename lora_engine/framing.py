"""Defines `Framing`: which part of an original image a training image shows. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Side = Annotated[int, Field(gt=0, le=100_000_000)]
_Offset = Annotated[int, Field(ge=0, le=100_000_000)]


class Framing(BaseModel):
    """The resize and the crop that an image was made with, as in diffusers' training scripts of SDXL.

    Attributes:
        original: (height, width) of the original image in pixels.
        resized: (height, width) that it was resized to before the crop.
        top: Row of the crop in the resized image.
        left: Column of the crop in the resized image.
        size: (height, width) of the crop: those of the image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    original: tuple[_Side, _Side]
    resized: tuple[_Side, _Side]
    top: _Offset
    left: _Offset
    size: tuple[_Side, _Side]

    @model_validator(mode="after")
    def _crop_is_inside(self) -> Framing:
        if self.top + self.size[0] > self.resized[0] or self.left + self.size[1] > self.resized[1]:
            raise ValueError(
                f"a crop of {self.size[0]} x {self.size[1]} pixels at row {self.top}, column {self.left} does not fit "
                f"into {self.resized[0]} x {self.resized[1]}"
            )
        return self

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Framing:
        """Returns the framing of an image that was neither resized nor cropped."""
        return cls(original=size, resized=size, top=0, left=0, size=size)

    def mirrored(self) -> Framing:
        """Returns the framing of the image mirrored left to right: it was mirrored before the crop."""
        return self.model_copy(update={"left": self.resized[1] - self.left - self.size[1]})

    def then(self, resized: tuple[int, int], top: int, left: int, size: tuple[int, int]) -> Framing:
        """Returns the framing after another resize to (height, width) and another crop of the image."""
        scales = [new / old for new, old in zip(resized, self.size, strict=True)]
        whole = [max(1, round(side * scale)) for side, scale in zip(self.resized, scales, strict=True)]
        offsets = (round(self.top * scales[0]) + top, round(self.left * scales[1]) + left)
        # Rounding must not move the crop out of the resized image.
        height, width = (max(side, offset + cut) for side, offset, cut in zip(whole, offsets, size, strict=True))
        return Framing(original=self.original, resized=(height, width), top=offsets[0], left=offsets[1], size=size)
