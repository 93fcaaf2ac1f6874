"""How a family adds noise and what its network predicts. Pure functions of tensors; no sampler lives here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.registries import Registry


@dataclass(frozen=True)
class Parameterisation:
    """One way to noise a picture and to state what is predicted.

    Attributes:
        add_noise: (x0, noise, alphas_cumprod at t) -> the noisy latents.
        target: (x0, noise, alphas_cumprod at t) -> what the network should give.
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


parameterisations: Registry[Parameterisation] = Registry("parameterisation")
parameterisations.add("eps", Parameterisation(_diffuse, _noise))
parameterisations.add("v_prediction", Parameterisation(_diffuse, _velocity))

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

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latents [n, ...] at timesteps t [n] (int64)."""
        return parameterisations[self.parameterisation].add_noise(x0, noise, self._kept(x0, t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for them."""
        return parameterisations[self.parameterisation].target(x0, noise, self._kept(x0, t))

    def _kept(self, x0: Tensor, t: Tensor) -> Tensor:
        kept = self.alphas_cumprod.to(x0.device, x0.dtype)[t.to(x0.device)]
        return kept.view(-1, *[1] * (x0.dim() - 1))


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
