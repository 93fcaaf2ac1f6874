"""Draws images and grids of images from prompts that name registered adapters."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import SettingsError
from lora_engine.inference import ComposedEngine
from lora_engine.inference.grid import Axis, Cell, cells_of
from lora_engine.inference.prompts.prompt import ParsedPrompt, parse_prompt
from lora_engine.progress import Progress, no_progress
from registry.store.snapshot import find_scratch
from tasks.operations.adapter_files import fetch_adapter
from tasks.progress import StepEvent, publish

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.inference.draw import Drawer, DrawSettings
    from lora_engine.inference.image_metadata import Drawing

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
    """Generates images and writes them as PNG files, named by their seeds.

    Args:
        request: What to draw.
        folder: The output folder.
        home: The home with the named versions.
    """
    from lora_engine.inference.draw import write_drawn

    prompt = parse_prompt(request.prompt)
    with _drawing(request, home, [prompt]) as draw_one:
        pixels, drawing, settings = draw_one(prompt, request, _publish)
    paths = [folder / f"{seed}.png" for seed in settings.seeds]
    for path, seed, image in zip(paths, settings.seeds, pixels, strict=True):
        write_drawn(path, image, drawing, seed)
    return paths


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
        SettingsError: An axis or one of its values cannot be used; nothing is drawn.
    """
    from lora_engine.data.images import write_image
    from lora_engine.data.pixels import to_image
    from lora_engine.inference.draw import write_drawn
    from lora_engine.inference.grid import compose_sheet, write_animation

    rows = cells_of(request.prompt, axes)
    prompts = {cell.prompt: parse_prompt(cell.prompt) for row in rows for cell in row}
    requests = [[_changed(request, cell) for cell in row] for row in rows]
    paths: list[Path] = []
    sheet: list[list[Tensor]] = []
    total = sum(map(len, rows))
    with _drawing(request, home, list(prompts.values())) as draw_one:
        for number, row in enumerate(requests):
            sheet.append([])
            for column, one in enumerate(row):
                pixels, drawing, settings = draw_one(prompts[one.prompt], one)
                paths.append(folder / f"{number:02d}-{column:02d}.png")
                write_drawn(paths[-1], pixels[0], drawing, settings.seeds[0])
                sheet[-1].append(pixels[0])
                _publish(len(paths), total, {})
    images = [[to_image(pixels) for pixels in row] for row in sheet]
    write_image(folder / GRID, compose_sheet(images, axes))
    if animated:
        write_animation(folder / ANIMATION, images[0])
    return [folder / GRID, *([folder / ANIMATION] if animated else []), *paths]


def settings_of(request: DrawRequest) -> DrawSettings:
    """Returns the engine's settings of a request."""
    from lora_engine.inference.draw import DrawSettings

    return DrawSettings(
        range(request.seed, request.seed + request.count),
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
    )


def _publish(done: int, total: int, values: Mapping[str, float]) -> None:
    publish(StepEvent("generate", "progress", done, total, values))


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


@contextmanager
def _drawing(request: DrawRequest, home: Path, prompts: Sequence[ParsedPrompt]) -> Iterator[_DrawOne]:
    """Yields a function that draws a prompt; the base is loaded, and the adapters are fetched, once."""
    from lora_engine.bases.source import resolve_base
    from lora_engine.compute import fitting_threads, threads
    from lora_engine.inference.draw import Drawer

    negative = parse_prompt(request.negative, is_negative=True)
    names = dict.fromkeys(tag.name for prompt in prompts for tag in prompt.adapters)
    count = fitting_threads([resolve_base(request.base)])
    with tempfile.TemporaryDirectory(dir=find_scratch()) as work, threads(count):
        files = {name: fetch_adapter(name, home, Path(work) / str(index)) for index, name in enumerate(names)}
        drawer = Drawer(request.base, clip_skip=request.clip_skip, vae=request.vae)
        yield _DrawOne(drawer, files, negative)


@dataclass(frozen=True)
class _DrawOne:
    drawer: Drawer
    files: dict[str, tuple[Path, str]]
    negative: ParsedPrompt

    def __call__(
        self, prompt: ParsedPrompt, request: DrawRequest, progress: Progress = no_progress
    ) -> tuple[Tensor, Drawing, DrawSettings]:
        settings = settings_of(request)
        pixels, drawing = self.drawer.draw(
            prompt,
            settings,
            files=[self.files[tag.name] for tag in prompt.adapters],
            negative=self.negative,
            progress=progress,
        )
        return pixels, drawing, settings
