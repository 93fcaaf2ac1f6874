"""Axes and cells of image grids."""

from __future__ import annotations

import pytest
from PIL import Image

from lora_engine.errors import SettingsError
from lora_engine.inference.grid import Axis, compose_sheet, parse_axis, sheets_of


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("seed=1,2,3", Axis("seed", ("1", "2", "3"))),
        ("W=0..1/5", Axis("W", ("0", "0.25", "0.5", "0.75", "1"))),
        ("W=1..0/3", Axis("W", ("1", "0.5", "0"))),
        ("W=-1..1/1", Axis("W", ("-1",))),
        (" red = red, dark green ", Axis("red", ("red", "dark green"))),
    ],
)
def test_axes_are_lists_or_ranges(text: str, axis: Axis) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize("text", ["", "seed", "=1", "seed=", "seed=1,,2", "W=0..1/0", f"seed={','.join(['1'] * 401)}"])
def test_an_axis_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="axis"):
        parse_axis(text)


def test_a_word_of_the_prompt_is_replaced_and_so_is_its_complement() -> None:
    axes = [parse_axis("W=0..1/3"), parse_axis("steps=4,8")]
    (rows,) = sheets_of("a W2 zorb <lora:a:W> <lora:b:1-W>", axes)
    assert [cell.prompt for cell in rows[1]] == [
        "a W2 zorb <lora:a:0> <lora:b:1>",
        "a W2 zorb <lora:a:0.5> <lora:b:0.5>",
        "a W2 zorb <lora:a:1> <lora:b:0>",
    ]
    assert [[cell.settings for cell in row] for row in rows] == [[{"steps": "4"}] * 3, [{"steps": "8"}] * 3]


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        (["blue=red,green"], "'blue' is not a word of the prompt"),
        (["seed=1,2", "seed=3"], "both axes are 'seed'"),
        (["seed=0..99/21", "steps=0..99/20"], "21 x 20 images"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: list[str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        sheets_of("a red zorb", [parse_axis(axis) for axis in axes])


def test_a_sheet_has_each_image_whole_and_in_its_place() -> None:
    colors = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(9, 0, 0), (0, 9, 0), (0, 0, 9)]]
    rows = [[Image.new("RGB", (20, 10), color) for color in row] for row in colors]
    sheet = compose_sheet(rows, [parse_axis("seed=1,2,3"), parse_axis("steps=4,8")])
    for row in colors:
        for color in row:
            assert sum(count for count, found in sheet.getcolors(1 << 20) or [] if found == color) >= 200
