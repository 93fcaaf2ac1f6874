"""Draws grids of images, and composes their sheets."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import SettingsError
from lora_engine.inference.grid import Axis, Cell, sheets_of
from tasks.operations.draw_request import DrawRequest
from tasks.operations.image_drawing import Note, ignore_note, open_drawing

if TYPE_CHECKING:
    from torch import Tensor

GRID, ANIMATION = "grid.png", "animation.gif"


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
        InterruptedRun: A stop was requested; the finished images are written, the sheets are not.
        SettingsError: An axis or one of its values cannot be used; nothing is drawn.
    """
    from lora_engine.data.pixels import to_image
    from lora_engine.files import atomic_write
    from lora_engine.inference.grid import compose_sheet, write_animation
    from lora_engine.inference.image_files import encode_marked
    from lora_engine.inference.image_metadata import source_type_of

    sheets = sheets_of(request.prompt, axes, request.regions)
    requests = [[[_changed(request, cell) for cell in row] for row in rows] for rows in sheets]
    every = [one for rows in requests for row in rows for one in row]
    drawn: dict[tuple[int, int, int], Tensor] = {}
    with open_drawing(every, home, folder, note) as drawing:
        for place, one in _places(requests):
            shown = place if len(sheets) > 1 else place[1:]
            drawn[place] = drawing.draw(one, ["-".join(f"{number:02d}" for number in shown)])[0]
    written: list[Path] = []
    source_type = source_type_of(request.mask is not None or request.only_regions)
    for sheet, rows in enumerate(sheets):
        images = [[to_image(drawn[sheet, row, column]) for column in range(len(rows[0]))] for row in range(len(rows))]
        title = axes[2].labels[sheet] if axes[2:] else ""
        written.append(folder / (f"grid-{sheet:02d}.png" if len(sheets) > 1 else GRID))
        atomic_write(written[-1], encode_marked(compose_sheet(images, axes[:2], title), source_type))
        if animated and sheet == 0:
            write_animation(folder / ANIMATION, images[0])
    return [*written, *([folder / ANIMATION] if animated else []), *drawing.written]


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


def _places(requests: Sequence[Sequence[Sequence[DrawRequest]]]) -> Iterator[tuple[tuple[int, int, int], DrawRequest]]:
    for sheet, rows in enumerate(requests):
        for number, row in enumerate(rows):
            for column, one in enumerate(row):
                yield (sheet, number, column), one


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
