"""How a family adds noise and what its network predicts. Pure functions of tensors; no sampler lives here.

Diffusion (`NoiseSchedule`) counts its timesteps and looks the noise up in a table. Flow matching (`FlowSchedule`) is
continuous: its timesteps are sigmas times `timesteps`, and any number between is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_engine.registries import Registry


@dataclass(frozen=True)
class Parameterization:
    """One way to noise a picture and to state what is predicted.

    Attributes:
        add_noise: (x0, noise, level at t) -> the noisy latents; the level is `alphas_cumprod`, or sigma for a flow.
        target: (x0, noise, level at t) -> what the network should give.
    """

    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]


def _diffuse(x0: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    return kept**0.5 * x0 + (1 - kept) ** 0.5 * noise


def _noise(x0: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    del x0, kept
    return noise


def _velocity(x0: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    return kept**0.5 * noise - (1 - kept) ** 0.5 * x0


def _interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return (1 - sigma) * x0 + sigma * noise


def _flow(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    del sigma
    return noise - x0


parameterisations: Registry[Parameterization] = Registry("parameterisation")
parameterisations.add("eps", Parameterization(_diffuse, _noise))
parameterisations.add("v_prediction", Parameterization(_diffuse, _velocity))
parameterisations.add("flow", Parameterization(_interpolate, _flow))

# The names in the scheduler configurations of diffusers.
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of a base (Ho et al. 2020, eq. 4; v: Salimans & Ho 2022, appendix D).

    Attributes:
        alphas_cumprod: float32 [timesteps], the share of the signal's variance that is left at each timestep.
        parameterisation: A name among `parameterisations`.
    """

    alphas_cumprod: Tensor
    parameterisation: str

    @property
    def timesteps(self) -> int:
        """How many timesteps there are; valid ones are 0 ... timesteps - 1."""
        return self.alphas_cumprod.shape[0]

    def sigma_of(self, t: Tensor) -> Tensor:
        """Share of the noise's deviation at timesteps t [n]: sqrt(1 - alphas_cumprod), float32, 0 to 1."""
        return (1 - self.alphas_cumprod.to(t.device)[t]) ** 0.5

    def snr(self, t: Tensor) -> Tensor:
        """Variance of the signal over that of the noise at timesteps t [n], float32; 0 where only noise is left."""
        kept = self.alphas_cumprod.to(t.device)[t]
        return kept / (1 - kept)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latents [n, ...] at timesteps t [n] (int64)."""
        return parameterisations[self.parameterisation].add_noise(x0, noise, self._level(x0, t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for them."""
        return parameterisations[self.parameterisation].target(x0, noise, self._level(x0, t))

    def _level(self, x0: Tensor, t: Tensor) -> Tensor:
        kept = self.alphas_cumprod.to(x0.device, x0.dtype)[t.to(x0.device)]
        return kept.view(-1, *[1] * (x0.dim() - 1))


@dataclass(frozen=True)
class Shift:
    """How a flow's sigmas are moved towards noise (Esser et al. 2024, section 5.3.2).

    Attributes:
        factor: sigma -> factor * sigma / (1 + (factor - 1) * sigma), whatever the size; 1 moves nothing.
        dynamic: Whether instead the factor grows with the picture: exp(mu), mu linear in the number of image tokens.
        linear: Whether the dynamic factor is mu itself.
        tokens: Numbers of tokens at which mu is `low` and `high`.
        low: mu at the first number of tokens.
        high: mu at the second number of tokens.
        patch: Latent pixels of a token's side.
    """

    factor: float = 1.0
    dynamic: bool = False
    linear: bool = False
    tokens: tuple[int, int] = (256, 4096)
    low: float = 0.5
    high: float = 1.15
    patch: int = 2

    def mu(self, size: tuple[int, int]) -> float:
        """The `mu` of diffusers' scheduler for latents of (height, width)."""
        count = (size[0] // self.patch) * (size[1] // self.patch)
        slope = (self.high - self.low) / (self.tokens[1] - self.tokens[0])
        return count * slope + (self.low - slope * self.tokens[0])

    def __call__(self, sigmas: Tensor, size: tuple[int, int]) -> Tensor:
        """The sigmas, 0 to 1, as a picture with latents of (height, width) is trained and sampled with."""
        factor = self.factor
        if self.dynamic:
            factor = self.mu(size) if self.linear else math.exp(self.mu(size))
        return factor * sigmas / (1 + (factor - 1) * sigmas)


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow (Liu et al. 2023; Esser et al. 2024): x_t = (1 - sigma) x0 + sigma noise, sigma = t / timesteps.

    Timesteps may be of any dtype and lie anywhere from 0 (the picture) to `timesteps` (noise); `alphas_cumprod` holds
    the same ratio of signal to noise in the terms of diffusion, at whole timesteps.

    Attributes:
        shift: What the base's own sampler does with sigmas; a training that wants it draws sigmas through it.
    """

    shift: Shift = field(default_factory=Shift)

    def sigma_of(self, t: Tensor) -> Tensor:
        """Share of noise at timesteps t [n]: t / timesteps, float32, 0 to 1."""
        return t.to(torch.float32) / self.timesteps

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """The timesteps, float32, of sigmas from 0 to 1; the inverse of `sigma_of`."""
        return sigmas.to(torch.float32) * self.timesteps

    def snr(self, t: Tensor) -> Tensor:
        """((1 - sigma) / sigma)^2 at timesteps t [n], float32; infinite where there is no noise."""
        sigma = self.sigma_of(t)
        return ((1 - sigma) / sigma) ** 2

    def _level(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.sigma_of(t.to(x0.device)).to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))


def schedule_from(alphas_cumprod: Tensor, prediction_type: str) -> NoiseSchedule:
    """The schedule of a diffusers scheduler.

    Args:
        alphas_cumprod: As the scheduler holds it.
        prediction_type: As its configuration names it.

    Raises:
        SettingsError: A prediction type that is not known.
    """
    name = PREDICTION_TYPES.get(prediction_type, prediction_type)
    parameterisations[name]
    return NoiseSchedule(alphas_cumprod.to(torch.float32).clone(), name)


def flow_schedule_from(settings: Mapping[str, Any], patch: int = 2) -> FlowSchedule:
    """The schedule of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Args:
        settings: Its configuration.
        patch: Latent pixels of a token's side.
    """
    timesteps = int(settings.get("num_train_timesteps", 1000))
    sigmas = torch.arange(timesteps, dtype=torch.float32) / timesteps
    kept = (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)
    shift = Shift(
        factor=float(settings.get("shift", 1.0)),
        dynamic=bool(settings.get("use_dynamic_shifting", False)),
        linear=settings.get("time_shift_type") == "linear",
        tokens=(int(settings.get("base_image_seq_len", 256)), int(settings.get("max_image_seq_len", 4096))),
        low=float(settings.get("base_shift", 0.5)),
        high=float(settings.get("max_shift", 1.15)),
        patch=patch,
    )
    return FlowSchedule(kept, "flow", shift)
