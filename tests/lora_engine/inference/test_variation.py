"""Variations of noise against A1111's functions, and noise of one size in the middle of another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_engine.errors import SettingsError
from lora_engine.inference.draw_settings import DrawSettings
from lora_engine.inference.generate import draw_noise
from lora_engine.inference.variation import NoiseVariation, draw_varied

SHAPE = (4, 6, 8)


def a1111(share: float, low: Tensor, high: Tensor) -> Tensor:
    """Interpolates as A1111's `modules/rng.py` describes: by the angle between vectors of unit length."""
    angles = torch.nn.functional.cosine_similarity(low.double(), high.double(), dim=1).acos()
    weights = [((1 - share) * angles).sin() / angles.sin(), (share * angles).sin() / angles.sin()]
    return (weights[0][:, None] * low + weights[1][:, None] * high).float()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_variation_is_a1111s_interpolation_of_the_two_noises(share: float) -> None:
    first, second = draw_noise(SHAPE, 3), draw_noise(SHAPE, 8)
    varied = draw_varied(SHAPE, 3, NoiseVariation(8, share))
    torch.testing.assert_close(varied, a1111(share, first, second), rtol=1e-5, atol=1e-5)
    assert 0.9 < float(varied.std()) < 1.1


def test_the_ends_of_a_variation_are_the_two_noises() -> None:
    assert torch.equal(draw_varied(SHAPE, 3, NoiseVariation(8, 0.0)), draw_noise(SHAPE, 3))
    assert torch.equal(draw_varied(SHAPE, 3, None), draw_noise(SHAPE, 3))
    torch.testing.assert_close(draw_varied(SHAPE, 3, NoiseVariation(8, 1.0)), draw_noise(SHAPE, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(draw_varied(SHAPE, 3, NoiseVariation(3, 0.5)), draw_noise(SHAPE, 3))


@pytest.mark.parametrize("inner", [(4, 4, 4), (4, 10, 12), (4, 4, 12), SHAPE])
def test_noise_of_another_size_is_in_the_middle(inner: tuple[int, int, int]) -> None:
    noise, drawn = draw_noise(inner, 3), draw_varied(SHAPE, 3, None, inner)
    assert drawn.shape == SHAPE
    top, left = ((SHAPE[axis] - inner[axis]) // 2 for axis in (1, 2))
    for y in range(SHAPE[1]):
        for x in range(SHAPE[2]):
            is_inside = 0 <= y - top < inner[1] and 0 <= x - left < inner[2]
            expected = noise[:, y - top, x - left] if is_inside else draw_noise(SHAPE, 3)[:, y, x]
            assert torch.equal(drawn[:, y, x], expected)


def test_the_seed_of_a_variation_counts_up() -> None:
    settings = DrawSettings([3, 3, 3], variation=NoiseVariation(8, 0.5))
    assert [settings.variation_of(number) for number in range(3)] == [NoiseVariation(8 + n, 0.5) for n in range(3)]
    assert DrawSettings([3], variation=NoiseVariation(8, 0.0)).variation_of(0) is None


@pytest.mark.parametrize("text", ["", "7", "7:", "7:.", ":0.5", "7:1.5", "-1:0.5", "7:0.5:1", "a:0.5", "7:nan"])
def test_what_is_no_variation_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"variation"):
        NoiseVariation.parse(text)


def test_a_variation_is_read_from_text() -> None:
    assert NoiseVariation.parse(" 7:0.25 ") == NoiseVariation(7, 0.25)
    assert NoiseVariation.parse("7:1") == NoiseVariation(7, 1.0)
