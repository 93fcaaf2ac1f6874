"""Draws images and grids of images from prompts that name registered adapters."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import SettingsError
from lora_engine.inference import ComposedEngine
from lora_engine.inference.grid import Axis, Cell, sheets_of
from lora_engine.inference.prompts.prompt import ParsedPrompt, parse_prompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.progress import Progress, no_progress
from registry.store.snapshot import find_scratch
from tasks.operations.adapter_files import fetch_adapter
from tasks.progress import StepEvent, publish

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.inference.draw import Drawer, DrawSettings
    from lora_engine.inference.image_metadata import Drawing

Note = Callable[[str], None]


def ignore_note(text: str) -> None:
    """Does nothing with a line of text."""
    del text


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
        regions: Prompts of parts of the image, `WHERE=PROMPT`; see `lora_engine.inference.regions.parse_region`.
        feather: Standard deviation of the blur of the regions' borders, in pixels.
        only_regions: True draws only what the regions cover of `image`.
        adapter_guidance: Scale between the predictions without and with the adapters; 1 is that with them.
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
    regions: tuple[str, ...] = ()
    feather: float = 0.0
    only_regions: bool = False
    adapter_guidance: float = 1.0


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


def draw(request: DrawRequest, folder: Path, home: Path, note: Note = ignore_note) -> list[Path]:
    """Generates images and writes them as PNG files, named by their seeds.

    Args:
        request: What to draw.
        folder: The output folder.
        home: The home with the named versions.
        note: Takes the weights that the cards of adapters recommend, as a line of text each.
    """
    from lora_engine.inference.draw import write_drawn

    prompt = parse_prompt(request.prompt)
    with _drawing(request, home, [prompt], note) as draw_one:
        pixels, drawing, settings = draw_one(prompt, request, _publish)
    paths = [folder / f"{seed}.png" for seed in settings.seeds]
    for path, seed, image in zip(paths, settings.seeds, pixels, strict=True):
        write_drawn(path, image, drawing, seed)
    return paths


def draw_grid(
    request: DrawRequest,
    axes: Sequence[Axis],
    folder: Path,
    home: Path,
    *,
    animated: bool,
    note: Note = ignore_note,
) -> list[Path]:
    """Generates one image per cell of a grid, and the sheets of all of them.

    Args:
        request: What to draw; its count is not used.
        axes: One to three.
        folder: The output folder, which gets `grid.png` and `ROW-COLUMN.png`; with a third axis, `grid-SHEET.png` and
            `SHEET-ROW-COLUMN.png`.
        home: The home with the named versions.
        animated: True writes the images of the first row as `animation.gif`, too.
        note: See `draw`.

    Returns:
        The sheets, the animation if there is one, and the images.

    Raises:
        SettingsError: An axis or one of its values cannot be used; nothing is drawn.
    """
    from lora_engine.data.images import write_image
    from lora_engine.data.pixels import to_image
    from lora_engine.inference.draw import write_drawn
    from lora_engine.inference.grid import compose_sheet, write_animation

    sheets = sheets_of(request.prompt, axes, request.regions)
    prompts = {cell.prompt: parse_prompt(cell.prompt) for rows in sheets for row in rows for cell in row}
    requests = [[[_changed(request, cell) for cell in row] for row in rows] for rows in sheets]
    every = [one for rows in requests for row in rows for one in row]
    paths: list[Path] = []
    drawn: dict[tuple[int, int, int], Tensor] = {}
    with _drawing(request, home, list(prompts.values()), note, every) as draw_one:
        for place, one in _places(requests):
            pixels, drawing, settings = draw_one(prompts[one.prompt], one)
            shown = place if len(sheets) > 1 else place[1:]
            paths.append(folder / f"{'-'.join(f'{number:02d}' for number in shown)}.png")
            write_drawn(paths[-1], pixels[0], drawing, settings.seeds[0])
            drawn[place] = pixels[0]
            _publish(len(paths), len(every), {})
    written: list[Path] = []
    for sheet, rows in enumerate(sheets):
        images = [[to_image(drawn[sheet, row, column]) for column in range(len(rows[0]))] for row in range(len(rows))]
        title = axes[2].labels[sheet] if axes[2:] else ""
        written.append(folder / (f"grid-{sheet:02d}.png" if len(sheets) > 1 else GRID))
        write_image(written[-1], compose_sheet(images, axes[:2], title))
        if animated and sheet == 0:
            write_animation(folder / ANIMATION, images[0])
    return [*written, *([folder / ANIMATION] if animated else []), *paths]


def _places(requests: Sequence[Sequence[Sequence[DrawRequest]]]) -> Iterator[tuple[tuple[int, int, int], DrawRequest]]:
    for sheet, rows in enumerate(requests):
        for number, row in enumerate(rows):
            for column, one in enumerate(row):
                yield (sheet, number, column), one


def requests_of_grid(request: DrawRequest, axes: Sequence[Axis]) -> list[list[DrawRequest]]:
    """Returns the rows of a grid, with a request for one image per cell.

    Args:
        request: What to draw; its count is not used.
        axes: One or two.

    Raises:
        SettingsError: An axis or one of its values cannot be used.
    """
    (rows,) = sheets_of(request.prompt, axes, request.regions)
    return [[_changed(request, cell) for cell in row] for row in rows]


def compose_grid(files: Sequence[Sequence[bytes]], axes: Sequence[Axis]) -> bytes:
    """Returns the sheet of a grid as a PNG file.

    Args:
        files: The rows of the grid, with a PNG file per cell.
        axes: The axes that its requests have.
    """
    from lora_engine.data.images import encode_png, open_pillow
    from lora_engine.inference.grid import compose_sheet

    images = [[open_pillow(io.BytesIO(file)).convert("RGB") for file in row] for row in files]
    return encode_png(compose_sheet(images, axes))


def draw_each(requests: Sequence[DrawRequest], home: Path) -> Iterator[list[bytes]]:
    """Yields the images of each request as PNG files; the base is loaded, and the adapters are fetched, once.

    Args:
        requests: What to draw; all with the base, the negative prompt and the autoencoder of the first.
        home: The home with the named versions.
    """
    from lora_engine.data.images import encode_png
    from lora_engine.data.pixels import to_image

    prompts = [parse_prompt(request.prompt) for request in requests]
    with _drawing(requests[0], home, prompts, ignore_note, requests) as draw_one:
        for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True), 1):
            pixels, _, _ = draw_one(prompt, request)
            _publish(number, len(requests), {})
            yield [encode_png(to_image(image)) for image in pixels]


def settings_of(request: DrawRequest) -> DrawSettings:
    """Returns the engine's settings of a request."""
    from lora_engine.inference.draw import DrawSettings
    from lora_engine.inference.regions import Regions, parse_region

    regions = Regions(tuple(map(parse_region, request.regions)), request.feather, request.only_regions)
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
        regions=regions,
        adapter_guidance=request.adapter_guidance,
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
    return replace(request, prompt=cell.prompt, regions=cell.regions, count=1, **values)


@contextmanager
def _drawing(
    request: DrawRequest,
    home: Path,
    prompts: Sequence[ParsedPrompt],
    note: Note,
    requests: Sequence[DrawRequest] | None = None,
) -> Iterator[_DrawOne]:
    """Yields a function that draws a prompt; the base is loaded, and the adapters are fetched, once.

    Args:
        request: What all drawings share.
        home: The home with the named versions.
        prompts: All prompts.
        note: See `draw`.
        requests: All requests, for their regions; None is the one.
    """
    from lora_engine.bases.source import resolve_base
    from lora_engine.compute import fitting_threads, threads
    from lora_engine.inference.draw import Drawer
    from lora_engine.inference.regions import parse_region

    negative = parse_prompt(request.negative, is_negative=True)
    regions = dict.fromkeys(text for one in requests or [request] for text in one.regions)
    texts = [*prompts, *(parse_region(text).prompt for text in regions)]
    names = dict.fromkeys(tag.name for prompt in texts for tag in prompt.adapters)
    count = fitting_threads([resolve_base(request.base)])
    with tempfile.TemporaryDirectory(dir=find_scratch()) as work, threads(count):
        files = {name: fetch_adapter(name, home, Path(work) / str(index)) for index, name in enumerate(names)}
        drawer = Drawer(request.base, clip_skip=request.clip_skip, vae=request.vae)
        yield _DrawOne(drawer, files, negative, note, set())


@dataclass(frozen=True)
class _DrawOne:
    drawer: Drawer
    files: dict[str, tuple[Path, str]]
    negative: ParsedPrompt
    note: Note
    noted: set[str]

    def __call__(
        self, prompt: ParsedPrompt, request: DrawRequest, progress: Progress = no_progress
    ) -> tuple[Tensor, Drawing, DrawSettings]:
        from lora_engine.inference.settled_tags import all_tags

        settings = settings_of(request)
        tags = all_tags(prompt, settings.regions)
        pixels, drawing = self.drawer.draw(
            prompt,
            settings,
            files=[self.files[tag.name] for tag in tags],
            negative=self.negative,
            progress=progress,
        )
        self._note_recommended(tags, drawing)
        return pixels, drawing, settings

    def _note_recommended(self, tags: Sequence[AdapterTag], drawing: Drawing) -> None:
        """Notes, once, the weights that tags with a name alone have from the cards of their adapters."""
        bare = {tag.name for tag in tags if tag.is_bare}
        for tag in drawing.prompt.adapters:
            if tag.name in bare and tag != AdapterTag(tag.name, guidance=tag.guidance) and tag.name not in self.noted:
                self.noted.add(tag.name)
                weights = ", ".join(f"{name} {value}" for name, value in tag.facts().items())
                self.note(f"{tag.name}: {weights}, as its card recommends")
