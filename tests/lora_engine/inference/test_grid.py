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
        (["weight=0,1"], "there is not"),
        (["adapter=a:1,b", "weight=0,1"], "adapter 'a:1' has a weight"),
        (["seed=1,2", "steps=3", "seed=4"], "both axes are 'seed'"),
        (["seed=0..9/10", "steps=1..9/9", "guidance=1..5/5"], "10 x 9 x 5 images"),
        (["seed=1,2", "seed=3"], "both axes are 'seed'"),
        (["seed=0..99/21", "steps=0..99/20"], "21 x 20 images"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: list[str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        sheets_of("a red zorb", [parse_axis(axis) for axis in axes])


def test_a_third_axis_makes_a_sheet_per_value() -> None:
    sheets = sheets_of("a red zorb", [parse_axis(text) for text in ("seed=1,2", "steps=4,8", "red=red,green,blue")])
    assert [[[cell.prompt for cell in row] for row in rows] for rows in sheets] == [
        [[f"a {color} zorb"] * 2] * 2 for color in ("red", "green", "blue")
    ]
    assert sheets[2][1][0].settings == {"seed": "1", "steps": "8"}


def test_an_axis_of_adapters_adds_each_beside_those_of_the_prompt() -> None:
    axes = [parse_axis("adapter=a@1,none,b@2"), parse_axis("weight=0.5,1")]
    (rows,) = sheets_of("a zorb <lora:fixed@1:0.3>", axes)
    start = "a zorb <lora:fixed@1:0.3>"
    assert [[cell.prompt for cell in row] for row in rows] == [
        [f"{start} <lora:a@1:{weight}>", start, f"{start} <lora:b@2:{weight}>"] for weight in ("0.5", "1")
    ]
    (rows,) = sheets_of("a zorb", [parse_axis("adapter=a@1:0.2,b@2:0@0;1@1")])
    assert [cell.prompt for cell in rows[0]] == ["a zorb <lora:a@1:0.2>", "a zorb <lora:b@2:0@0;1@1>"]


def test_words_named_adapter_and_weight_are_words() -> None:
    (rows,) = sheets_of("the weight of an adapter", [parse_axis("adapter=cube"), parse_axis("weight=color")])
    assert rows[0][0].prompt == "the color of an cube"


def test_words_of_regions_are_replaced_and_their_places_are_not() -> None:
    (rows,) = sheets_of("a zorb", [parse_axis("red=green,blue")], ["red.png=a red <lora:a:red>", "0,0,1,1=b"])
    assert [cell.regions for cell in rows[0]] == [
        (f"red.png=a {color} <lora:a:{color}>", "0,0,1,1=b") for color in ("green", "blue")
    ]


def test_a_sheet_has_each_image_whole_and_in_its_place() -> None:
    colors = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(9, 0, 0), (0, 9, 0), (0, 0, 9)]]
    rows = [[Image.new("RGB", (20, 10), color) for color in row] for row in colors]
    sheet = compose_sheet(rows, [parse_axis("seed=1,2,3"), parse_axis("steps=4,8")])
    titled = compose_sheet(rows, [parse_axis("seed=1,2,3"), parse_axis("steps=4,8")], "guidance = 2")
    assert titled.height > sheet.height
    for row in colors:
        for color in row:
            for one in (sheet, titled):
                assert sum(count for count, found in one.getcolors(1 << 20) or [] if found == color) >= 200
