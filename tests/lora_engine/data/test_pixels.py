from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_engine.data.pixels import read_pixels, to_image, write_png
from lora_engine.errors import DataError


def test_every_level_survives_a_round_trip(tmp_path: Path) -> None:
    levels = torch.arange(256, dtype=torch.float32).view(1, 16, 16).expand(3, -1, -1) / 127.5 - 1.0
    write_png(tmp_path / "levels.png", levels)
    again = read_pixels(tmp_path / "levels.png")
    assert again.dtype == torch.float32
    assert torch.equal(again, levels)


def test_values_beyond_the_range_are_clipped(tmp_path: Path) -> None:
    write_png(tmp_path / "loud.png", torch.tensor([-3.0, 3.0]).view(1, 1, 2).expand(3, -1, -1))
    assert read_pixels(tmp_path / "loud.png")[:, 0].tolist() == [[-1.0, 1.0]] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="NaN or Inf"):
        to_image(torch.full((3, 2, 2), value))


def test_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(1, 3, 2, 2\)"):
        to_image(torch.zeros(1, 3, 2, 2))
