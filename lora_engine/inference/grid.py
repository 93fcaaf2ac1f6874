"""Grids of images over one or two axes, as X/Y plots of A1111: what changes along each, and the sheet of all images."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write

SETTINGS = ("seed", "steps", "guidance", "sampler", "strength")
"""Axes that are settings; any other is a text of the prompt."""
MAX_CELLS = 400
_RANGE = re.compile(r"(-?[0-9]{1,9}(?:\.[0-9]{0,9})?)\.\.(-?[0-9]{1,9}(?:\.[0-9]{0,9})?)/([0-9]{1,3})")
_NUMBER = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{0,9})?")
_LABEL, _GAP, _LEAST_SIDE = 14, 4, 128
_NEAREST = Image.Resampling.NEAREST


@dataclass(frozen=True)
class Axis:
    """What changes along one side of a grid.

    Attributes:
        name: One of `SETTINGS`, or a text of the prompt.
        values: What it becomes.
    """

    name: str
    values: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of rows or columns."""
        return tuple(f"{self.name} = {value}" for value in self.values)


@dataclass(frozen=True)
class Cell:
    """One image of a grid.

    Attributes:
        prompt: The prompt.
        settings: Values of axes that are settings, by name.
    """

    prompt: str
    settings: Mapping[str, str]


def parse_axis(text: str) -> Axis:
    """Reads `NAME=VALUE,VALUE,...` or `NAME=FIRST..LAST/COUNT`, which are equally spaced numbers.

    Raises:
        SettingsError: There is no name or value, or more than 400.
    """
    name, equals, rest = text.partition("=")
    if match := _RANGE.fullmatch(rest.strip()):
        first, last, count = float(match[1]), float(match[2]), int(match[3])
        steps = range(count)
        values = [f"{first + (last - first) * step / max(count - 1, 1):.6g}" for step in steps]
    else:
        values = [value.strip() for value in rest.split(",")]
    if not name.strip() or not equals or not values or not all(values) or len(values) > MAX_CELLS:
        raise SettingsError(
            f"axis {text[:80]!r}",
            allowed=f"NAME=VALUE,VALUE or NAME=FIRST..LAST/COUNT, with at most {MAX_CELLS} values",
        )
    return Axis(name.strip(), tuple(values))


def cells_of(prompt: str, axes: Sequence[Axis]) -> list[list[Cell]]:
    """Returns the rows of a grid: one per value of the second axis, with a cell per value of the first.

    An axis that is no setting replaces its name in the prompt, as a whole word; `1-NAME` becomes one minus the value.

    Raises:
        SettingsError: A name is not in the prompt or twice among the axes, or there are more than 400 cells.
    """
    first, second = axes[0], axes[1] if len(axes) > 1 else Axis("", ("",))
    if len(first.values) * len(second.values) > MAX_CELLS:
        raise SettingsError(f"{len(first.values)} x {len(second.values)} images", allowed=f"at most {MAX_CELLS}")
    if first.name == second.name:
        raise SettingsError(f"both axes are {first.name!r}", remedy="leave one out")
    for axis in axes:
        if axis.name not in SETTINGS and not _word(axis.name).search(prompt):
            raise SettingsError(
                f"axis {axis.name!r} is not a word of the prompt {prompt[:80]!r}",
                allowed=f"{', '.join(SETTINGS)}, or a word of the prompt",
            )
    rows = []
    for below in second.values:
        changes = {second.name: below} if second.name else {}
        rows.append([_cell(prompt, {first.name: value, **changes}) for value in first.values])
    return rows


def compose_sheet(rows: Sequence[Sequence[Image.Image]], axes: Sequence[Axis]) -> Image.Image:
    """Returns all images of a grid with labels, each in the place of its cell; small ones are enlarged."""
    factor = max(1, _LEAST_SIDE // max(max(image.size) for row in rows for image in row))
    rows = [[image.resize((image.width * factor, image.height * factor), _NEAREST) for image in row] for row in rows]
    font = ImageFont.load_default(size=_LABEL)
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    margin = max((int(font.getlength(label)) for label in axes[1].labels), default=0) + 2 * _GAP if axes[1:] else 0
    top = _LABEL + 2 * _GAP
    wide = max(width, *(int(font.getlength(label)) for label in axes[0].labels)) + _GAP
    sheet = Image.new("RGB", (margin + wide * len(rows[0]), top + (height + _GAP) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(axes[0].labels):
        pen.text((margin + wide * column, _GAP), label, fill="black", font=font)
    for number, row in enumerate(rows):
        if axes[1:]:
            pen.text((_GAP, top + (height + _GAP) * number), axes[1].labels[number], fill="black", font=font)
        for column, image in enumerate(row):
            sheet.paste(image, (margin + wide * column, top + (height + _GAP) * number))
    return sheet


def write_animation(path: Path, images: Sequence[Image.Image], milliseconds: int = 200) -> None:
    """Writes images as a GIF that repeats without end."""
    buffer = io.BytesIO()
    first, *rest = images
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    atomic_write(path, buffer.getvalue())


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(1-)?(?<![\w.]){re.escape(name)}(?![\w.])")


def _cell(prompt: str, changes: Mapping[str, str]) -> Cell:
    settings = {name: value for name, value in changes.items() if name in SETTINGS}
    for name, value in changes.items():
        if name in SETTINGS:
            continue
        complement = f"{1 - float(value):.6g}" if _NUMBER.fullmatch(value) else None

        def replaced(match: re.Match[str], value: str = value, complement: str | None = complement) -> str:
            if match[1] is None:
                return value
            return complement if complement is not None else f"1-{value}"

        prompt = _word(name).sub(replaced, prompt)
    return Cell(prompt, settings)
