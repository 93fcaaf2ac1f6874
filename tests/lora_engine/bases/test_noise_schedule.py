from __future__ import annotations

import pytest
import torch

from lora_engine.bases.noise import schedule_from
from lora_engine.errors import SettingsError


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_those_of_diffusers(kind: str, rescaled: bool) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind, rescale_betas_zero_snr=rescaled)
    schedule = schedule_from(scheduler.alphas_cumprod, kind)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    t = torch.tensor([0, 1, 500, 998, 999])
    assert torch.equal(schedule.add_noise(clean, noise, t), scheduler.add_noise(clean, noise, t))
    expected = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, t)
    assert torch.equal(schedule.target(clean, noise, t), expected)
    assert schedule.timesteps == 1000


def test_an_unknown_prediction_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="v_prediction"):
        schedule_from(torch.ones(10), "sample")
