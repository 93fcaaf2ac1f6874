"""The objective as arithmetic: timesteps, noise, and how an error counts. Pure functions of tensors and generators.

Everything holds for each row of a batch by itself, so that the rows of class pictures are treated as the others are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.noise import FlowSchedule, NoiseSchedule
from lora_engine.errors import SettingsError
from lora_engine.training.measure import Measure, snr_weights
from lora_engine.training.specs.objective import (
    Distribution,
    LogitNormal,
    Mode,
    Objective,
    Plain,
    Pyramid,
    Uniform,
)


class Noised(Protocol):
    """What `noisy_and_target` needs of a batch.

    Attributes:
        latents: float32 [n, channels, height, width], without noise.
        noise: Of the same shape.
        timesteps: [n], int64, or float32 for a flow.
        perturbation: What the input's noise is disturbed by, or None.
    """

    @property
    def latents(self) -> Tensor: ...  # noqa: D102

    @property
    def noise(self) -> Tensor: ...  # noqa: D102

    @property
    def timesteps(self) -> Tensor: ...  # noqa: D102

    @property
    def perturbation(self) -> Tensor | None: ...  # noqa: D102


def noisy_and_target(schedule: NoiseSchedule, batch: Noised) -> tuple[Tensor, Tensor]:
    """A batch's noisy latents, and what the network should make of them; both float32 in the latents' shape.

    A perturbation disturbs the input alone (Ning et al. 2023, eq. 8).
    """
    seen = batch.noise if batch.perturbation is None else batch.noise + batch.perturbation
    noisy = schedule.add_noise(batch.latents, seen, batch.timesteps)
    return noisy, schedule.target(batch.latents, batch.noise, batch.timesteps)


def check_objective(objective: Objective, schedule: NoiseSchedule) -> None:
    """Does nothing where an objective suits a base.

    Raises:
        SettingsError: It does not.
    """
    flows = isinstance(schedule, FlowSchedule)
    if flows and not isinstance(objective.weighting, Plain):
        raise SettingsError(
            f"the weighting {objective.weighting.name!r} does not belong to a base of flow matching",
            where="objective.weighting",
            allowed="none",
            remedy="choose timesteps.distribution logit_normal or mode instead",
        )
    if not flows and objective.timesteps.shift is not None:
        raise SettingsError(
            f"shift {objective.timesteps.shift} belongs to bases of flow matching; this one predicts "
            f"{'v' if schedule.parameterisation == 'v_prediction' else 'noise'}",
            where="objective.timesteps.shift",
            remedy="leave it out",
        )
    if not flows and not len(_steps(objective, schedule)):
        raise SettingsError(
            f"there is no timestep between {objective.timesteps.low} and {objective.timesteps.high}",
            where="objective.timesteps",
            allowed=f"ranges of at least 1 / {schedule.timesteps}",
        )


def draw_timesteps(
    objective: Objective, schedule: NoiseSchedule, count: int, generator: torch.Generator, size: tuple[int, int]
) -> Tensor:
    """The timesteps of a batch, on the CPU.

    Args:
        objective: Which ones, how often.
        schedule: Of the base.
        count: Rows.
        generator: Where they come from.
        size: (height, width) of the latents, by which some bases shift.

    Returns:
        [count]: int64 from 0 to `schedule.timesteps` - 1, or for a flow float32 up to `schedule.timesteps`.
    """
    wanted = objective.timesteps
    if not isinstance(schedule, FlowSchedule):
        steps = _steps(objective, schedule)
        if isinstance(wanted.distribution, Uniform):
            return torch.randint(steps.start, steps.stop, (count,), generator=generator)
        places = _draw_shares(wanted.distribution, count, generator) * len(steps)
        return steps.start + places.to(torch.int64).clamp(0, len(steps) - 1)
    sigmas = _draw_shares(wanted.distribution, count, generator)
    if wanted.shift is None:
        sigmas = schedule.shift(sigmas, size)
    else:
        sigmas = wanted.shift * sigmas / (1 + (wanted.shift - 1) * sigmas)
    return schedule.timesteps_of(wanted.low + (wanted.high - wanted.low) * sigmas)


def timestep_grid(schedule: NoiseSchedule, count: int) -> Tensor:
    """Timesteps in the middles of `count` equal parts of a schedule: int64 [count], or float32 for a flow."""
    middles = (torch.arange(count) + 0.5) * schedule.timesteps / count
    if isinstance(schedule, FlowSchedule):
        return middles
    return middles.to(torch.int64).clamp(max=schedule.timesteps - 1)


def _steps(objective: Objective, schedule: NoiseSchedule) -> range:
    wanted, count = objective.timesteps, schedule.timesteps
    return range(math.floor(wanted.low * count), math.ceil(wanted.high * count))


def _draw_shares(distribution: Distribution, count: int, generator: torch.Generator) -> Tensor:
    # float32 [count] from 0 (the picture) to 1 (noise), where the distribution has the paper's meaning.
    if isinstance(distribution, LogitNormal):
        normal = torch.randn(count, generator=generator)
        return torch.sigmoid(distribution.mean + distribution.std * normal)
    even = torch.rand(count, generator=generator)
    if isinstance(distribution, Mode):
        bump = torch.cos(math.pi / 2 * even) ** 2 - 1 + even
        return (1 - even - distribution.scale * bump).clamp(0.0, 1.0)
    return even


def draw_noise(objective: Objective, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The noise of a batch: float32 [n, channels, height, width], on the CPU.

    White noise first, so that what comes on top of it changes no other draw before it.
    """
    noise = torch.randn(tuple(shape), generator=generator)
    if objective.pyramid is not None:
        noise = _add_pyramid(noise, objective.pyramid, generator)
    if objective.noise_offset:
        level = torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=generator)
        noise = noise + objective.noise_offset * level
    return noise


def draw_perturbation(objective: Objective, shape: Sequence[int], generator: torch.Generator) -> Tensor | None:
    """What disturbs the input's noise, in its shape, on the CPU; None where nothing does, and nothing is drawn then."""
    if not objective.input_perturbation:
        return None
    return objective.input_perturbation * torch.randn(tuple(shape), generator=generator)


def _add_pyramid(noise: Tensor, pyramid: Pyramid, generator: torch.Generator) -> Tensor:
    # Each level is two to four times as coarse as the one before. Every picture is scaled back to a mean square of 1,
    # which is what ratios of signal to noise go by, and by itself: its neighbours must not change it.
    size = noise.shape[-2:]
    scale, found = 1.0, noise
    for level in range(1, pyramid.levels + 1):
        scale *= 2.0 + 2.0 * float(torch.rand((), generator=generator))
        small = tuple(max(1, int(side / scale)) for side in size)
        coarse = torch.randn((*noise.shape[:-2], *small), generator=generator)
        found = found + pyramid.discount**level * F.interpolate(coarse, size=size, mode="bilinear")
        if max(small) == 1:
            break
    return found / found.flatten(1).square().mean(dim=1).sqrt().view(-1, *[1] * (noise.dim() - 1))


def measure_for(objective: Objective, schedule: NoiseSchedule) -> Measure:
    """How errors count under an objective on a base.

    Raises:
        SettingsError: The objective does not suit the base.
    """
    check_objective(objective, schedule)
    if isinstance(objective.weighting, Plain):
        return Measure(objective.loss)
    weighting, predicts_v = objective.weighting, schedule.parameterisation == "v_prediction"
    return Measure(objective.loss, lambda timesteps: snr_weights(weighting, schedule.snr(timesteps), predicts_v))
