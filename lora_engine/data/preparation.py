"""Defines what a manifest records about the making of an image: crop, enlargement, mask. Imports no image code."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

_Pixel = Annotated[int, Field(ge=-100_000_000, le=100_000_000)]


class Preparation(BaseModel):
    """How ingest and preprocess made an image; None means that there is nothing to say.

    Attributes:
        box: Left, top, right and bottom of the part of the image that is kept, in pixels of the image before.
        faces: Number of faces in the image.
        angle: Degrees that the image was turned counterclockwise around the center of the box.
        scale: Factor of enlargement, above 1.
        upscaler: What enlarged it.
        mask: Where its mask is from: `transparency`, `faces`, or a model; None means a file, or that there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    box: tuple[_Pixel, _Pixel, _Pixel, _Pixel] | None = None
    faces: int | None = Field(default=None, ge=0, le=10_000)
    angle: float | None = Field(default=None, allow_inf_nan=False)
    scale: float | None = Field(default=None, gt=1.0, allow_inf_nan=False)
    upscaler: str | None = Field(default=None, max_length=500)
    mask: str | None = Field(default=None, max_length=500)

    def describe(self) -> list[str]:
        """Returns its facts in words."""
        facts = {
            f"{self.faces} face{'s' * (self.faces != 1)}": self.faces is not None,
            f"turned by {self.angle or 0:g} degrees": self.angle is not None,
            f"enlarged {self.scale or 1:.2f} times by {self.upscaler}": self.scale is not None,
            f"mask of {self.mask}": self.mask is not None,
        }
        return [fact for fact, is_known in facts.items() if is_known]

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}
