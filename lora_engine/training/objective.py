"""Computes the objective: timesteps, noise and loss weights. Pure functions of tensors and generators.

Every row of a batch is treated independently, class images like the user's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.noise import FlowSchedule, NoiseSchedule
from lora_engine.errors import SettingsError
from lora_engine.training.measure import Measure, snr_weights
from lora_engine.training.specs.objective import (
    Distribution,
    Huber,
    LogitNormal,
    Mode,
    Objective,
    Plain,
    Pyramid,
    SmoothL1,
    Uniform,
)


class NoisyBatch(Protocol):
    """The fields of a batch that `noisy_and_target` needs.

    Attributes:
        latents: float32 [n, channels, height, width], without noise.
        noise: float32 in the shape of `latents`.
        timesteps: [n], int64, or float32 for a flow.
        perturbation: Extra noise of the input, or None.
    """

    @property
    def latents(self) -> Tensor: ...  # noqa: D102

    @property
    def noise(self) -> Tensor: ...  # noqa: D102

    @property
    def timesteps(self) -> Tensor: ...  # noqa: D102

    @property
    def perturbation(self) -> Tensor | None: ...  # noqa: D102


def noisy_and_target(schedule: NoiseSchedule, batch: NoisyBatch) -> tuple[Tensor, Tensor]:
    """Returns a batch's noisy latents and the network's target; both float32 in the latents' shape.

    A perturbation changes the input only (Ning et al. 2023, eq. 8).
    """
    input_noise = batch.noise if batch.perturbation is None else batch.noise + batch.perturbation
    noisy = schedule.add_noise(batch.latents, input_noise, batch.timesteps)
    return noisy, schedule.target(batch.latents, batch.noise, batch.timesteps)


def check_objective(objective: Objective, schedule: NoiseSchedule) -> None:
    """Checks that an objective suits a base.

    Raises:
        SettingsError: It does not.
    """
    is_flow = isinstance(schedule, FlowSchedule)
    if is_flow and not isinstance(objective.weighting, Plain):
        raise SettingsError(
            f"the weighting {objective.weighting.name!r} does not apply to a flow-matching base",
            where="objective.weighting",
            allowed="none",
            remedy="set timesteps.distribution to logit_normal or mode instead",
        )
    if is_flow and getattr(objective.loss, "schedule", "") == "snr":
        raise SettingsError(
            "the schedule 'snr' of the loss does not apply to a flow-matching base",
            where="objective.loss.schedule",
            allowed="constant, exponential",
        )
    if not is_flow and objective.timesteps.shift is not None:
        raise SettingsError(
            f"shift {objective.timesteps.shift} applies to flow-matching bases only; this base predicts "
            f"{'v' if schedule.parameterization == 'v_prediction' else 'noise'}",
            where="objective.timesteps.shift",
            remedy="remove it",
        )
    if not is_flow and not len(_steps(objective, schedule)):
        raise SettingsError(
            f"there is no timestep between {objective.timesteps.low} and {objective.timesteps.high}",
            where="objective.timesteps",
            allowed=f"ranges of at least 1 / {schedule.timesteps}",
        )


def draw_timesteps(
    objective: Objective, schedule: NoiseSchedule, count: int, generator: torch.Generator, size: tuple[int, int]
) -> Tensor:
    """Returns the timesteps of a batch, on the CPU.

    Args:
        objective: Range and distribution of the timesteps.
        schedule: Noise schedule of the base.
        count: Number of rows.
        generator: CPU generator.
        size: (height, width) of the latents, on which the shift of some bases depends.

    Returns:
        [count]: int64 from 0 to `schedule.timesteps` - 1, or for a flow float32 up to `schedule.timesteps`.
    """
    settings = objective.timesteps
    if not isinstance(schedule, FlowSchedule):
        steps = _steps(objective, schedule)
        if isinstance(settings.distribution, Uniform):
            return torch.randint(steps.start, steps.stop, (count,), generator=generator)
        offsets = _draw_shares(settings.distribution, count, generator) * len(steps)
        return steps.start + offsets.to(torch.int64).clamp(0, len(steps) - 1)
    sigmas = _draw_shares(settings.distribution, count, generator)
    if settings.shift is None:
        sigmas = schedule.shift(sigmas, size)
    else:
        sigmas = settings.shift * sigmas / (1 + (settings.shift - 1) * sigmas)
    return schedule.timesteps_of(settings.low + (settings.high - settings.low) * sigmas)


def timestep_grid(schedule: NoiseSchedule, count: int) -> Tensor:
    """Returns the midpoints of `count` equal parts of a schedule: int64 [count], or float32 for a flow."""
    middles = (torch.arange(count) + 0.5) * schedule.timesteps / count
    if isinstance(schedule, FlowSchedule):
        return middles
    return middles.to(torch.int64).clamp(max=schedule.timesteps - 1)


def _steps(objective: Objective, schedule: NoiseSchedule) -> range:
    settings, count = objective.timesteps, schedule.timesteps
    return range(math.floor(settings.low * count), math.ceil(settings.high * count))


def _draw_shares(distribution: Distribution, count: int, generator: torch.Generator) -> Tensor:
    # float32 [count] from 0 (the image) to 1 (noise), the direction that the papers' distributions assume.
    if isinstance(distribution, LogitNormal):
        normal = torch.randn(count, generator=generator)
        return torch.sigmoid(distribution.mean + distribution.std * normal)
    even = torch.rand(count, generator=generator)
    if isinstance(distribution, Mode):
        bump = torch.cos(math.pi / 2 * even) ** 2 - 1 + even
        return (1 - even - distribution.scale * bump).clamp(0.0, 1.0)
    return even


def draw_training_noise(objective: Objective, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Returns the noise of a batch: float32 [n, channels, height, width], on the CPU.

    White noise is drawn first, so that pyramid and offset do not change it.
    """
    noise = torch.randn(tuple(shape), generator=generator)
    if objective.pyramid is not None:
        noise = _add_pyramid(noise, objective.pyramid, generator)
    if objective.noise_offset:
        level = torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=generator)
        noise = noise + objective.noise_offset * level * _strengths(objective.random_offset, shape, generator)
    return noise


def _strengths(is_random: bool, shape: Sequence[int], generator: torch.Generator) -> Tensor | float:
    """Returns the share of a strength that each image has: [n, 1, ...] from 0 to 1, or 1 without a draw."""
    return torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=generator) if is_random else 1.0


def draw_perturbation(objective: Objective, shape: Sequence[int], generator: torch.Generator) -> Tensor | None:
    """Returns the input's extra noise on the CPU; None, without a draw, if it is disabled."""
    if not objective.input_perturbation:
        return None
    noise = objective.input_perturbation * torch.randn(tuple(shape), generator=generator)
    return noise * _strengths(objective.random_perturbation, shape, generator)


def _add_pyramid(noise: Tensor, pyramid: Pyramid, generator: torch.Generator) -> Tensor:
    # Each level is two to four times as coarse as the previous one. Each image is scaled back to a mean square of 1,
    # which signal-to-noise ratios assume, independently of its neighbors in the batch.
    size = noise.shape[-2:]
    scale, sum_of_levels = 1.0, noise
    for level in range(1, pyramid.levels + 1):
        scale *= 2.0 + 2.0 * float(torch.rand((), generator=generator))
        small = tuple(max(1, int(side / scale)) for side in size)
        coarse = torch.randn((*noise.shape[:-2], *small), generator=generator)
        sum_of_levels = sum_of_levels + pyramid.discount**level * F.interpolate(coarse, size=size, mode="bilinear")
        if max(small) == 1:
            break
    return sum_of_levels / sum_of_levels.flatten(1).square().mean(dim=1).sqrt().view(-1, *[1] * (noise.dim() - 1))


def measure_for(objective: Objective, schedule: NoiseSchedule) -> Measure:
    """Returns the loss function of an objective on a base.

    Raises:
        SettingsError: The objective does not suit the base.
    """
    check_objective(objective, schedule)
    loss, weighting, predicts_v = objective.loss, objective.weighting, schedule.parameterization == "v_prediction"
    deltas = None
    if isinstance(loss, Huber | SmoothL1) and loss.schedule != "constant":
        deltas = partial(scheduled_deltas, loss, schedule)
    if isinstance(weighting, Plain):
        return Measure(loss, deltas=deltas)
    return Measure(loss, lambda timesteps: snr_weights(weighting, schedule.snr(timesteps), predicts_v), deltas)


def scheduled_deltas(loss: Huber | SmoothL1, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Returns the delta of each row: float32 [n], 1 without noise and `loss.delta` in pure noise.

    The schedules are those of sd-scripts (`huber_schedule`); see `Huber`.
    """
    if loss.schedule == "exponential":
        return loss.delta ** (timesteps.to(torch.float32) / schedule.timesteps)
    sigmas = schedule.snr(timesteps).to(torch.float32).rsqrt()
    return (1.0 - loss.delta) / (1.0 + sigmas).square() + loss.delta
