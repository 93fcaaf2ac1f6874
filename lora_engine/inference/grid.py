"""Grids of images over one to three axes, as X/Y/Z plots of A1111: what changes along each, and the sheets."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write

SETTINGS = ("seed", "steps", "guidance", "sampler", "strength")
"""Axes that are settings; any other is a text of the prompt, or one of `ADAPTER` and `WEIGHT`."""
ADAPTER, WEIGHT, NONE = "adapter", "weight", "none"
"""Axes that add an adapter to the prompt, and give it a weight; and the value that adds none."""
MAX_CELLS = 400
_RANGE = re.compile(r"(-?[0-9]{1,9}(?:\.[0-9]{0,9})?)\.\.(-?[0-9]{1,9}(?:\.[0-9]{0,9})?)/([0-9]{1,3})")
_NUMBER = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{0,9})?")
_LABEL, _GAP, _LEAST_SIDE = 14, 4, 128
_NEAREST = Image.Resampling.NEAREST


@dataclass(frozen=True)
class Axis:
    """What changes along one side of a grid.

    Attributes:
        name: One of `SETTINGS`, `ADAPTER` or `WEIGHT`, or a text of the prompt.
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
        regions: The regions, `WHERE=PROMPT`.
    """

    prompt: str
    settings: Mapping[str, str]
    regions: tuple[str, ...] = ()


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


def sheets_of(prompt: str, axes: Sequence[Axis], regions: Sequence[str] = ()) -> list[list[list[Cell]]]:
    """Returns the sheets of a grid: one per value of the third axis, with a row per value of the second.

    An axis that is no setting replaces its name in the prompt and in the prompts of regions, as a whole word; `1-NAME`
    becomes one minus the value. If the prompt has no such word, `adapter` adds each value as a tag beside those of the
    prompt, and `weight` is the weight of that tag.

    Args:
        prompt: The prompt.
        axes: One to three.
        regions: The regions, `WHERE=PROMPT`.

    Raises:
        SettingsError: A name is not in the prompt or twice among the axes, or there are more than 400 cells.
    """
    _check(prompt, axes, regions)
    first, second, third = [*axes, Axis("", ("",)), Axis("", ("",))][:3]

    def cell(*values: str) -> Cell:
        changes = {axis.name: value for axis, value in zip((first, second, third), values, strict=True) if axis.name}
        return _cell(prompt, regions, changes)

    return [
        [[cell(across, below, behind) for across in first.values] for below in second.values] for behind in third.values
    ]


def _check(prompt: str, axes: Sequence[Axis], regions: Sequence[str]) -> None:
    counts = [len(axis.values) for axis in axes]
    if math.prod(counts) > MAX_CELLS:
        raise SettingsError(f"{' x '.join(map(str, counts))} images", allowed=f"at most {MAX_CELLS}")
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise SettingsError(f"both axes are {repeated!r}", remedy="leave one out")
    for axis in axes:
        if axis.name in SETTINGS or _is_word(axis.name, prompt, regions):
            continue
        if axis.name == WEIGHT and ADAPTER not in names:
            raise SettingsError("axis 'weight' weighs the adapters of an axis 'adapter', which there is not")
        if axis.name not in {ADAPTER, WEIGHT}:
            raise SettingsError(
                f"axis {axis.name!r} is not a word of the prompt {prompt[:80]!r}",
                allowed=f"{', '.join(SETTINGS)}, {ADAPTER}, {WEIGHT}, or a word of the prompt",
            )


def _is_word(name: str, prompt: str, regions: Sequence[str]) -> bool:
    return any(_word(name).search(text) for text in (prompt, *(region.partition("=")[2] for region in regions)))


def compose_sheet(rows: Sequence[Sequence[Image.Image]], axes: Sequence[Axis], title: str = "") -> Image.Image:
    """Returns all images of a sheet with labels, each in the place of its cell; small ones are enlarged.

    Args:
        rows: The images.
        axes: The first axis, and the second if there is one.
        title: Text above the labels; empty writes none.
    """
    factor = max(1, _LEAST_SIDE // max(max(image.size) for row in rows for image in row))
    rows = [[image.resize((image.width * factor, image.height * factor), _NEAREST) for image in row] for row in rows]
    font = ImageFont.load_default(size=_LABEL)
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    margin = max((int(font.getlength(label)) for label in axes[1].labels), default=0) + 2 * _GAP if axes[1:] else 0
    above = _LABEL + _GAP if title else 0
    top = above + _LABEL + 2 * _GAP
    wide = max(width, *(int(font.getlength(label)) for label in axes[0].labels)) + _GAP
    sheet = Image.new("RGB", (margin + wide * len(rows[0]), top + (height + _GAP) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, _GAP), title, fill="black", font=font)
    for column, label in enumerate(axes[0].labels):
        pen.text((margin + wide * column, above + _GAP), label, fill="black", font=font)
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


def _cell(prompt: str, regions: Sequence[str], changes: Mapping[str, str]) -> Cell:
    settings = {name: value for name, value in changes.items() if name in SETTINGS}
    added = {name: value for name, value in changes.items() if name in {ADAPTER, WEIGHT}}
    added = {name: value for name, value in added.items() if not _is_word(name, prompt, regions)}
    texts = [region.partition("=") for region in regions]
    for name, value in changes.items():
        if name not in settings and name not in added:
            prompt = _replaced(prompt, name, value)
            texts = [(where, equals, _replaced(text, name, value)) for where, equals, text in texts]
    if added.get(ADAPTER, NONE) != NONE:
        prompt = f"{prompt} {_tag(added[ADAPTER], added.get(WEIGHT))}"
    return Cell(prompt, settings, tuple("".join(text) for text in texts))


def _tag(adapter: str, weight: str | None) -> str:
    if weight is not None and ":" in adapter:
        raise SettingsError(
            f"adapter {adapter[:80]!r} has a weight, and so has the axis 'weight'", remedy="leave one of both out"
        )
    return f"<lora:{adapter}>" if weight is None else f"<lora:{adapter}:{weight}>"


def _replaced(text: str, name: str, value: str) -> str:
    complement = f"{1 - float(value):.6g}" if _NUMBER.fullmatch(value) else f"1-{value}"
    return _word(name).sub(lambda match: value if match[1] is None else complement, text)
