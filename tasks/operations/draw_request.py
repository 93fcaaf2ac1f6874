"""Defines the request for images, and the engine's settings of it."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import SettingsError
from lora_engine.inference import ImageFormat
from lora_engine.inference.draw_options import DrawOptions

if TYPE_CHECKING:
    from lora_engine.inference.draw_settings import DrawSettings
    from lora_engine.inference.image_files import ImageOptions


@dataclass(frozen=True)
class DrawRequest(DrawOptions):
    """What to draw; see also `DrawOptions`.

    Attributes:
        prompt: In A1111's syntax (docs/prompts.md); may name adapters: `<lora:name@production:0.7>` or
            `<lora:path/to/file.safetensors:0.7>`.
        base: The base model.
        negative: The negative prompt.
        count: Number of images; of a grid, one per cell.
        seed: Seed of the first image; the others count up.
        vae: Another autoencoder: a folder or a hub id.
        regions: Prompts of parts of the image, `WHERE=PROMPT`; see `lora_engine.inference.regions.parse_region`.
        feather: Standard deviation of the blur of the regions' borders, in pixels.
        only_regions: True draws only what the regions cover of `image`.
        tile_vae: True decodes one image at a time, in tiles.
        offload: Share of the denoiser's linear layers whose weights stay in the CPU's memory.
        previews: Steps between two updates of `preview.png`; 0 writes none.
        format: `png`, `webp` or `jpeg`.
        quality: Of JPEG and WebP, 1 to 100.
        credentials: Certificate and key to sign images with; None does not sign.
    """

    prompt: str
    base: str = "tiny"
    negative: str = ""
    count: int = 1
    seed: int = 0
    _: KW_ONLY
    vae: str | None = None
    regions: tuple[str, ...] = ()
    feather: float = 0.0
    only_regions: bool = False
    tile_vae: bool = False
    offload: float = 0.0
    previews: int = 0
    format: ImageFormat = "png"
    quality: int = 90
    credentials: tuple[Path, Path] | None = None

    def options(self) -> ImageOptions:
        """Returns how the images are written."""
        from lora_engine.inference.content_credentials import Credentials
        from lora_engine.inference.image_files import ImageOptions

        signature = None if self.credentials is None else Credentials.read(*self.credentials)
        return ImageOptions(self.format, self.quality, signature)


_SIZE = re.compile(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?")


def parse_size(text: str) -> tuple[int, int]:
    """Reads `WIDTHxHEIGHT`, or one number for both, in pixels.

    Returns:
        Height and width.

    Raises:
        SettingsError: It is neither.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"size {text[:40]!r}", allowed="WIDTHxHEIGHT in pixels, such as 768x512, or one number")
    return int(match[2] or match[1]), int(match[1])


def settings_of(request: DrawRequest) -> DrawSettings:
    """Returns the engine's settings of a request; with a variation, its seed counts up instead of the image's."""
    from lora_engine.inference.draw_settings import DrawSettings
    from lora_engine.inference.regions import Regions, parse_region

    is_varied = request.variation is not None and request.variation.strength > 0.0
    return DrawSettings(
        [request.seed] * request.count if is_varied else range(request.seed, request.seed + request.count),
        Regions(tuple(map(parse_region, request.regions)), request.feather, request.only_regions),
        **{option.name: getattr(request, option.name) for option in fields(DrawOptions)},
    )
