"""Losses by timestep: means of bands, and the gap between training and held-out images."""

from __future__ import annotations

import numpy as np
import pytest

from lora_engine.evaluation.bands import band_losses, training_gap


def test_a_band_is_the_mean_over_its_timesteps_and_images() -> None:
    base = np.arange(20, dtype=np.float64).reshape(2, 10)
    bands = band_losses({"base": base, "adapter": base + 1})
    assert [band.losses["base"] for band in bands] == [5.5, 7.5, 9.5, 11.5, 13.5]
    assert [band.losses["adapter"] - band.losses["base"] for band in bands] == [1.0] * 5
    assert [(band.low, band.high) for band in bands] == [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)]
    assert bands[0].as_dict() == {"low": 0.0, "high": 0.2, "losses": {"base": 5.5, "adapter": 6.5}}


def test_bands_of_unequal_numbers_of_timesteps_cover_all() -> None:
    bands = band_losses({"base": np.arange(8, dtype=np.float64)[None]}, bands=3)
    assert [band.losses["base"] for band in bands] == [1.0, 3.5, 6.0]


def test_a_grid_without_images_or_with_few_timesteps_is_refused() -> None:
    for shape in ((0, 10), (3, 4), (10,)):
        with pytest.raises(ValueError, match="'base'"):
            band_losses({"base": np.zeros(shape)})


def test_the_gap_is_0_for_equal_losses_and_grows_as_training_images_are_memorized() -> None:
    heldout, training = np.array([0.3, 0.5]), np.array([0.4, 0.4, 0.4])
    assert training_gap(heldout, training) == pytest.approx([-0.1, 0.1])
    assert training_gap(heldout, training * 0.5).mean() == pytest.approx(0.2)
