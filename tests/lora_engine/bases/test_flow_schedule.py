from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_engine.bases.noise import FlowSchedule, flow_schedule_from, schedule_from

SETTINGS = [
    {"shift": 1.0},
    {"shift": 3.0},
    {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


def test_noise_and_target_of_a_flow_equal_those_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    flow = flow_schedule_from(scheduler.config)
    clean, noise = pair()
    t = scheduler.timesteps[[0, 10, 500, 998, 999]]
    torch.testing.assert_close(flow.add_noise(clean, noise, t), scheduler.scale_noise(clean, t, noise))
    torch.testing.assert_close(flow.sigma_of(t), scheduler.sigmas[[0, 10, 500, 998, 999]])
    assert torch.equal(flow.target(clean, noise, t), noise - clean)
    assert (flow.timesteps, flow.parameterization) == (1000, "flow")


def test_a_flow_is_linear_between_image_and_noise() -> None:
    flow = flow_schedule_from({})
    clean, noise = pair()
    t = torch.tensor([0.0, 1000.0, 250.0, 500.5, 999.0])
    noisy = flow.add_noise(clean, noise, t)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[1], noise[1])
    remaining = flow.sigma_of(t).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - remaining * flow.target(clean, noise, t), clean)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_timesteps_of_a_flow_may_be_integers(dtype: torch.dtype) -> None:
    flow = flow_schedule_from({})
    t = torch.tensor([0, 1, 500, 998, 999]).to(dtype)
    assert torch.equal(flow.sigma_of(t), torch.tensor([0, 1, 500, 998, 999]) / 1000)
    torch.testing.assert_close(flow.timesteps_of(flow.sigma_of(t)), t.float())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [(32, 32), (128, 128), (64, 96)])
def test_sigmas_are_shifted_as_in_the_scheduler_for_every_size(
    settings: dict[str, object], size: tuple[int, int]
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    flow = flow_schedule_from(scheduler.config).shift
    assert flow.dynamic == settings.get("use_dynamic_shifting", False)
    plain = np.linspace(1.0, 0.1, 10)
    mu = calculate_shift(size[0] * size[1] // 4, max_shift=scheduler.config.max_shift)
    scheduler.set_timesteps(sigmas=plain, mu=mu)
    shifted = flow(torch.from_numpy(plain).float(), size)
    torch.testing.assert_close(shifted, scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    if flow.dynamic:
        assert flow.mu(size) == pytest.approx(mu)


def test_a_larger_image_gets_more_noise() -> None:
    shift = flow_schedule_from(SETTINGS[2]).shift
    half = torch.tensor([0.5])
    assert 0.5 < shift(half, (32, 32)) < shift(half, (128, 128)) < 1.0
    assert flow_schedule_from(SETTINGS[0]).shift(half, (128, 128)) == 0.5


def test_the_signal_to_noise_ratio_of_every_parameterization() -> None:
    t = torch.tensor([1, 500, 999])
    alphas_cumprod = torch.linspace(0.999, 0.0, 1000)
    plain = schedule_from(alphas_cumprod, "epsilon")
    torch.testing.assert_close(plain.snr(t), alphas_cumprod[t] / (1 - alphas_cumprod[t]))
    assert plain.snr(torch.tensor([999])) == 0.0
    torch.testing.assert_close(plain.sigma_of(t), (1 - alphas_cumprod[t]).sqrt())
    flow = flow_schedule_from({})
    assert isinstance(flow, FlowSchedule)
    torch.testing.assert_close(flow.snr(t), ((1 - t / 1000) / (t / 1000)) ** 2)
    torch.testing.assert_close(flow.alphas_cumprod[t] / (1 - flow.alphas_cumprod[t]), flow.snr(t), rtol=0.02, atol=1e-6)
