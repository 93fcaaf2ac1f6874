"""Defines the noise schedules of the families and the targets of their networks. Pure functions of tensors.

Diffusion (`NoiseSchedule`) has integer timesteps and a table of noise levels. Flow matching (`FlowSchedule`) is
continuous: timesteps are sigmas times `timesteps`.
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
    """A forward process and the target of the network.

    Attributes:
        add_noise: (x0, noise, level at t) -> the noisy latents; the level is `alphas_cumprod`, or sigma for a flow.
        target: (x0, noise, level at t) -> the target of the prediction.
    """

    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]


def _diffuse(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


def _noise(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    del x0, alpha
    return noise


def _velocity(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    return alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0


def _interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return (1 - sigma) * x0 + sigma * noise


def _flow(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    del sigma
    return noise - x0


parameterizations: Registry[Parameterization] = Registry("parameterization")
parameterizations.add("eps", Parameterization(_diffuse, _noise))
parameterizations.add("v_prediction", Parameterization(_diffuse, _velocity))
parameterizations.add("flow", Parameterization(_interpolate, _flow))

# The names in the scheduler configurations of diffusers.
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of a base (Ho et al. 2020, eq. 4; v: Salimans & Ho 2022, appendix D).

    Attributes:
        alphas_cumprod: float32 [timesteps], remaining share of the signal's variance at each timestep.
        parameterization: A name among `parameterizations`.
    """

    alphas_cumprod: Tensor
    parameterization: str

    @property
    def timesteps(self) -> int:
        """Number of timesteps; valid ones are 0 ... timesteps - 1."""
        return self.alphas_cumprod.shape[0]

    def sigma_of(self, t: Tensor) -> Tensor:
        """Returns the standard deviation of the noise at timesteps t [n]: sqrt(1 - alphas_cumprod), float32, 0 to 1."""
        return (1 - self.alphas_cumprod.to(t.device)[t]) ** 0.5

    def snr(self, t: Tensor) -> Tensor:
        """Returns the signal-to-noise ratio of the variances at timesteps t [n], float32; 0 for pure noise."""
        alpha = self.alphas_cumprod.to(t.device)[t]
        return alpha / (1 - alpha)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the noisy latents [n, ...] at timesteps t [n] (int64)."""
        return parameterizations[self.parameterization].add_noise(x0, noise, self._level(x0, t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the target of the prediction at timesteps t [n]."""
        return parameterizations[self.parameterization].target(x0, noise, self._level(x0, t))

    def _level(self, x0: Tensor, t: Tensor) -> Tensor:
        alpha = self.alphas_cumprod.to(x0.device, x0.dtype)[t.to(x0.device)]
        return alpha.view(-1, *[1] * (x0.dim() - 1))


@dataclass(frozen=True)
class Shift:
    """The shift of a flow's sigmas towards noise (Esser et al. 2024, section 5.3.2).

    Attributes:
        factor: sigma -> factor * sigma / (1 + (factor - 1) * sigma), for every size; 1 is no shift.
        dynamic: True if the factor depends on the image size instead: exp(mu), mu linear in the number of image tokens.
        linear: True if the dynamic factor is mu itself.
        tokens: Numbers of tokens at which mu is `low` and `high`.
        low: mu at the first number of tokens.
        high: mu at the second number of tokens.
        patch: Side of a token in latent pixels.
    """

    factor: float = 1.0
    dynamic: bool = False
    linear: bool = False
    tokens: tuple[int, int] = (256, 4096)
    low: float = 0.5
    high: float = 1.15
    patch: int = 2

    def mu(self, size: tuple[int, int]) -> float:
        """Returns the `mu` of diffusers' scheduler for latents of (height, width)."""
        count = (size[0] // self.patch) * (size[1] // self.patch)
        slope = (self.high - self.low) / (self.tokens[1] - self.tokens[0])
        return count * slope + (self.low - slope * self.tokens[0])

    def __call__(self, sigmas: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the shifted sigmas, 0 to 1, for an image with latents of (height, width)."""
        factor = self.factor
        if self.dynamic:
            factor = self.mu(size) if self.linear else math.exp(self.mu(size))
        return factor * sigmas / (1 + (factor - 1) * sigmas)


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow (Liu et al. 2023; Esser et al. 2024): x_t = (1 - sigma) x0 + sigma noise, sigma = t / timesteps.

    Timesteps may have any dtype and any value from 0 (the image) to `timesteps` (noise); `alphas_cumprod` contains the
    equivalent signal-to-noise ratio in diffusion terms, at integer timesteps.

    Attributes:
        shift: The shift of the base's sampler; training may apply it to its sigmas.
    """

    shift: Shift = field(default_factory=Shift)

    def sigma_of(self, t: Tensor) -> Tensor:
        """Returns the share of noise at timesteps t [n]: t / timesteps, float32, 0 to 1."""
        return t.to(torch.float32) / self.timesteps

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """Returns the timesteps, float32, of sigmas from 0 to 1; the inverse of `sigma_of`."""
        return sigmas.to(torch.float32) * self.timesteps

    def snr(self, t: Tensor) -> Tensor:
        """Returns ((1 - sigma) / sigma)^2 at timesteps t [n], float32; infinite without noise."""
        sigma = self.sigma_of(t)
        return ((1 - sigma) / sigma) ** 2

    def _level(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.sigma_of(t.to(x0.device)).to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))


def schedule_from(alphas_cumprod: Tensor, prediction_type: str) -> NoiseSchedule:
    """Returns the noise schedule of a diffusers scheduler.

    Args:
        alphas_cumprod: `alphas_cumprod` of the scheduler.
        prediction_type: `prediction_type` of its configuration.

    Raises:
        SettingsError: The prediction type is unknown.
    """
    name = PREDICTION_TYPES.get(prediction_type, prediction_type)
    parameterizations[name]
    return NoiseSchedule(alphas_cumprod.to(torch.float32).clone(), name)


def flow_schedule_from(settings: Mapping[str, Any], patch: int = 2) -> FlowSchedule:
    """Returns the noise schedule of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Args:
        settings: Its configuration.
        patch: Side of a token in latent pixels.
    """
    timesteps = int(settings.get("num_train_timesteps", 1000))
    sigmas = torch.arange(timesteps, dtype=torch.float32) / timesteps
    alphas_cumprod = (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)
    shift = Shift(
        factor=float(settings.get("shift", 1.0)),
        dynamic=bool(settings.get("use_dynamic_shifting", False)),
        linear=settings.get("time_shift_type") == "linear",
        tokens=(int(settings.get("base_image_seq_len", 256)), int(settings.get("max_image_seq_len", 4096))),
        low=float(settings.get("base_shift", 0.5)),
        high=float(settings.get("max_shift", 1.15)),
        patch=patch,
    )
    return FlowSchedule(alphas_cumprod, "flow", shift)
