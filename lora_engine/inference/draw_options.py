"""`DrawOptions`: the settings of images that a user's request and the engine's settings share. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_engine.inference import ComposedEngine
from lora_engine.inference.variation import NoiseVariation


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What a request for images and the settings of the engine share.

    Attributes:
        steps: Number of denoising steps.
        guidance: Scale of classifier-free guidance.
        size: (height, width) in pixels; None takes that of the image to start from, cut to what the base can draw, or
            the base's default.
        sampler: See `find_sampler`; None is the base's own.
        image: File of an image to start from; None starts from noise.
        mask: File of a mask of that image, whose light parts are drawn; None draws all.
        strength: Share of the steps that run on the image, above 0 to 1.
        enlarge: Factor by which each image is enlarged and then drawn again, above 1 to 4; 1 does not.
        enlarged_strength: Share of the steps that run on the enlarged image, above 0 to 1.
        engine: `auto`, `merged` or `attached`: how adapters act on the base; see `composition.compose`.
        adapter_guidance: Scale between the predictions without and with the adapters whose tags have none; 1 is the
            prediction with them.
        variation: Noise that is mixed in; its seed is that of the first image and counts up. None mixes none.
        seed_size: (height, width) in pixels whose noise is put into the middle; None takes the size.
        clip_skip: Layer of the CLIP text encoders from the last, which is 1; None is that of the adapters' training.
        batch: Images that are drawn at once.
    """

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
    adapter_guidance: float = 1.0
    variation: NoiseVariation | None = None
    seed_size: tuple[int, int] | None = None
    clip_skip: int | None = None
    batch: int = 8
