"""Settings of images: what `Drawer.draw` takes beside prompts and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_engine.errors import SettingsError
from lora_engine.inference.draw_options import DrawOptions
from lora_engine.inference.regions import NO_REGIONS, Regions
from lora_engine.inference.variation import NoiseVariation


@dataclass(frozen=True)
class DrawSettings(DrawOptions):
    """Settings of images; see also `DrawOptions`.

    Attributes:
        seeds: One per image.
        regions: Regions with prompts and adapters of their own.
    """

    seeds: Sequence[int]
    regions: Regions = NO_REGIONS

    def __post_init__(self) -> None:
        if self.mask is not None and self.image is None:
            raise SettingsError("a mask needs an image", remedy="name the image to start from, too")
        if self.regions.is_mask and (self.mask is not None or self.image is None):
            raise SettingsError("only regions are to be drawn", remedy="name the image to start from, and no mask")
        if not 1.0 <= self.enlarge <= 4.0:
            raise SettingsError(f"images are to be enlarged by {self.enlarge:g}", allowed="a factor from 1 to 4")
        if self.batch < 1 or self.steps < 1:
            raise SettingsError(f"batch is {self.batch} and steps is {self.steps}", allowed="1 or more")

    def variation_of(self, index: int) -> NoiseVariation | None:
        """Returns the variation of an image by its number from 0; None if there is none or it changes nothing."""
        if self.variation is None or self.variation.strength == 0.0:
            return None
        return NoiseVariation(self.variation.seed + index, self.variation.strength)

    @property
    def image_steps(self) -> int:
        """Steps of all images, counting the second drawing of enlarged ones."""
        return len(self.seeds) * self.steps * (2 if self.enlarge > 1.0 else 1)
