"""Settings of images: what `Drawer.draw` takes beside prompts and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_engine.errors import SettingsError
from lora_engine.inference import ComposedEngine
from lora_engine.inference.regions import NO_REGIONS, Regions
from lora_engine.inference.variation import NoiseVariation


@dataclass(frozen=True)
class DrawSettings:
    """Settings of images.

    Attributes:
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        size: (height, width) in pixels; None takes the source image's, cut to what the base can draw, or the base's
            default.
        sampler: See `find_sampler`; None is the base's own.
        image: File of an image to start from; None starts from noise.
        mask: File of a mask of that image: light parts are drawn. None draws all.
        strength: Share of the steps that run on the image, above 0 to 1.
        enlarge: Factor by which each image is enlarged and then drawn again, above 1 to 4; 1 does not.
        enlarged_strength: Share of the steps that run on the enlarged image, above 0 to 1.
        engine: How adapters act on the base; see `compose`.
        variation: Noise that is mixed in; its seed is that of the first image and counts up. None mixes none.
        seed_size: (height, width) in pixels whose noise is put into the middle; None takes the size.
        batch: Images that are drawn at once.
        regions: Regions with prompts and adapters of their own.
        adapter_guidance: Scale between the predictions without and with the adapters whose tags have none; 1 is the
            prediction with them.
    """

    seeds: Sequence[int]
    steps: int = 20
    guidance: float = 3.0
    size: tuple[int, int] | None = None
    sampler: str | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float = 0.75
    enlarge: float = 1.0
    enlarged_strength: float = 0.5
    engine: ComposedEngine = "auto"
    variation: NoiseVariation | None = None
    seed_size: tuple[int, int] | None = None
    batch: int = 8
    regions: Regions = NO_REGIONS
    adapter_guidance: float = 1.0

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
