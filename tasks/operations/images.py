"""Draws images and grids of images from prompts that name registered adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import SettingsError
from lora_engine.inference import ComposedEngine
from lora_engine.inference.grid import Axis, Cell, cells_of
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.variation import NoiseVariation
from tasks.operations.image_drawing import open_drawing

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.inference.draw_settings import DrawSettings
    from lora_engine.inference.image_files import ImageFormat, ImageOptions

GRID, ANIMATION = "grid.png", "animation.gif"


@dataclass(frozen=True)
class DrawRequest:
    """What to draw.

    Attributes:
        prompt: In A1111's syntax (docs/prompts.md); may name adapters: `<lora:name@production:0.7>` or
            `<lora:path/to/file.safetensors:0.7>`.
        base: The base model.
        negative: The negative prompt.
        count: Number of images; of a grid, one per cell.
        seed: Seed of the first image; the others count up.
        steps: Number of denoising steps.
        guidance: Scale of classifier-free guidance.
        size: (height, width) in pixels; None means that of the image to start from, or the base's own.
        sampler: Name in sd-scripts, A1111 or diffusers; None is the base's own.
        clip_skip: Layer of the text encoders; None means that of the adapters' training.
        vae: Another autoencoder: a folder or a hub id.
        image: Image to start from; None starts from noise.
        mask: Mask of that image, whose light parts are drawn; None draws all.
        strength: Share of the steps that run on the image.
        enlarge: Factor by which each image is enlarged and drawn again; 1 does not.
        enlarged_strength: Share of the steps that run on the enlarged image.
        engine: `auto`, `merged` or `attached`; see `lora_engine.inference.composition.compose`.
        variation: Noise that is mixed in; see `DrawSettings`.
        seed_size: (height, width) in pixels whose noise is put into the middle; None means the size.
        batch: Images that are drawn at once.
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
    steps: int = 20
    guidance: float = 3.0
    size: tuple[int, int] | None = None
    sampler: str | None = None
    clip_skip: int | None = None
    vae: str | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float = 0.75
    enlarge: float = 1.0
    enlarged_strength: float = 0.5
    engine: ComposedEngine = "auto"
    variation: NoiseVariation | None = None
    seed_size: tuple[int, int] | None = None
    batch: int = 8
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


def draw(request: DrawRequest, folder: Path, home: Path) -> list[Path]:
    """Generates images and writes each batch when it is finished, named by their seeds.

    Args:
        request: What to draw.
        folder: The output folder.
        home: The home with the named versions.

    Raises:
        InterruptedRun: A stop was requested; the images of finished batches are written.
    """
    prompt, settings = parse_prompt(request.prompt), settings_of(request)
    names = []
    for number, seed in enumerate(settings.seeds):
        variation = settings.variation_of(number)
        names.append(str(seed) if variation is None else f"{seed}-{variation.seed}")
    with open_drawing(request, home, [prompt], folder, steps=settings.image_steps) as drawing:
        drawing.draw(prompt, settings, names)
    return drawing.written


def draw_grid(request: DrawRequest, axes: Sequence[Axis], folder: Path, home: Path, *, animated: bool) -> list[Path]:
    """Generates one image per cell of a grid, and the sheet of all of them.

    Args:
        request: What to draw; its count is not used.
        axes: One or two.
        folder: The output folder, which gets `grid.png` and `ROW-COLUMN.png`.
        home: The home with the named versions.
        animated: True writes the images of the first row as `animation.gif`, too.

    Returns:
        The sheet, the animation if there is one, and the images.

    Raises:
        InterruptedRun: A stop was requested; the finished images are written, the sheet is not.
        SettingsError: An axis or one of its values cannot be used; nothing is drawn.
    """
    from lora_engine.data.pixels import to_image
    from lora_engine.files import atomic_write
    from lora_engine.inference.grid import compose_sheet, write_animation
    from lora_engine.inference.image_files import encode_marked
    from lora_engine.inference.image_metadata import source_type_of

    rows = cells_of(request.prompt, axes)
    prompts = {cell.prompt: parse_prompt(cell.prompt) for row in rows for cell in row}
    requests = [[_changed(request, cell) for cell in row] for row in rows]
    steps = sum(settings_of(one).image_steps for row in requests for one in row)
    sheet: list[list[Tensor]] = []
    with open_drawing(request, home, list(prompts.values()), folder, steps=steps) as drawing:
        for number, row in enumerate(requests):
            sheet.append([])
            for column, one in enumerate(row):
                pixels = drawing.draw(prompts[one.prompt], settings_of(one), [f"{number:02d}-{column:02d}"])
                sheet[-1].append(pixels[0])
    images = [[to_image(pixels) for pixels in row] for row in sheet]
    sheet_bytes = encode_marked(compose_sheet(images, axes), source_type_of(request.mask is not None))
    atomic_write(folder / GRID, sheet_bytes)
    if animated:
        write_animation(folder / ANIMATION, images[0])
    return [folder / GRID, *([folder / ANIMATION] if animated else []), *drawing.written]


def settings_of(request: DrawRequest) -> DrawSettings:
    """Returns the engine's settings of a request; with a variation, its seed counts up instead of the image's."""
    from lora_engine.inference.draw_settings import DrawSettings

    is_varied = request.variation is not None and request.variation.strength > 0.0
    return DrawSettings(
        [request.seed] * request.count if is_varied else range(request.seed, request.seed + request.count),
        steps=request.steps,
        guidance=request.guidance,
        size=request.size,
        sampler=request.sampler,
        image=request.image,
        mask=request.mask,
        strength=request.strength,
        enlarge=request.enlarge,
        enlarged_strength=request.enlarged_strength,
        engine=request.engine,
        variation=request.variation,
        seed_size=request.seed_size,
        batch=request.batch,
    )


def _changed(request: DrawRequest, cell: Cell) -> DrawRequest:
    kinds = {"seed": int, "steps": int, "guidance": float, "sampler": str, "strength": float}
    values = {}
    for name, text in cell.settings.items():
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise SettingsError(f"{name} is {text!r}", where=f"axis {name}", allowed="a number") from None
    if values.get("seed", 0) < 0 or values.get("steps", 1) < 1:
        raise SettingsError(f"{values}", where="axis", allowed="a seed of 0 or more, steps of 1 or more")
    return replace(request, prompt=cell.prompt, count=1, **values)
