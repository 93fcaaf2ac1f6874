"""Samples images from prompts with classifier-free guidance. The caller attaches adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel, full_mask_conditioning
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.samplers import find_sampler
from lora_engine.errors import SettingsError
from lora_engine.inference.source_image import Start
from lora_engine.progress import Progress
from lora_engine.seeds import derive_seed


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 3.0,
    height: int | None = None,
    width: int | None = None,
    negative: str = "",
    batch: int = 8,
    masks: Conditioning | None = None,
    sampler: str | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Generates one image per prompt.

    An image depends on the weights, its prompt, its seed and the settings, not on the other images of the batch.

    Args:
        base: The model, with or without attached adapters.
        prompts: One per image.
        seeds: One per image; each seeds its own generator on the CPU, which makes devices agree.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance (Ho & Salimans 2022); 1 or less is none. A base with distilled
            guidance takes it as an input, if it has one.
        height: In pixels; None takes the base's default.
        width: In pixels; None takes the base's default.
        negative: Negative prompt; ignored by a base with distilled guidance.
        batch: Images per batch.
        masks: Result of `encode_mask` for inpainting bases, one row per image; None generates the full image.
        sampler: Name of another sampler; see `find_sampler`.
        progress: Called after each batch with the numbers of finished and of all images.

    Returns:
        float32 [n, 3, height, width] in [-1, 1], on the CPU.

    Raises:
        SettingsError: The counts differ, the base cannot generate the size, or the base takes no masks.
    """
    if len(seeds) != len(prompts):
        raise SettingsError(
            f"{len(prompts)} prompts and {len(seeds)} seeds do not match", allowed="one seed per prompt"
        )
    if steps < 1 or batch < 1:
        raise SettingsError(f"steps is {steps} and batch is {batch}", allowed="1 or more")
    size = (height or base.default_size[0], width or base.default_size[1])
    shape = base.latent_shape(size)
    if masks is not None and (not base.inpaints or len(masks) != len(prompts)):
        raise SettingsError(
            f"{len(masks)} masks and {len(prompts)} prompts do not match"
            if base.inpaints
            else "the base takes no masks",
            allowed="one mask per prompt, with an inpainting base",
        )
    images: list[Tensor] = []
    for first in range(0, len(prompts), batch):
        chosen = slice(first, first + batch)
        condition = _conditions(base, prompts[chosen], negative, size, guidance)
        if masks is None:
            condition = full_mask_conditioning(base, condition, size)
        else:
            rows = list(range(first, first + len(prompts[chosen])))
            condition = condition.with_tensors(masks.index(rows * (len(condition) // len(rows))))
        start = torch.stack([draw_noise(shape, seed) for seed in seeds[chosen]]).to(base.device)
        same = partial(_same, Guidance(condition))
        latents = sample(
            base, start, same, seeds=seeds[chosen], steps=steps, scale=guidance, size=size, sampler=sampler
        )
        images.append(base.decode_latents(latents).clamp(-1.0, 1.0).float().cpu())
        if progress is not None:
            progress(min(first + batch, len(prompts)), len(prompts), {})
    return torch.cat(images) if images else torch.empty(0, 3, *size)


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Returns standard normal noise of a shape, a pure function of the seed (taken modulo 2^63)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed % (1 << 63)))


def _conditions(
    base: BaseModel, prompts: Sequence[str], negative: str, size: tuple[int, int], guidance: float
) -> Conditioning:
    conditional = base.encode_text(prompts, size)
    if base.distilled:
        scales = torch.full((len(prompts),), guidance, dtype=torch.float32, device=base.device)
        return conditional.with_tensors(Conditioning({"guidance": scales}))
    if guidance <= 1.0:
        return conditional
    return Conditioning.cat([base.encode_negative([negative], size).index([0] * len(prompts)), conditional])


@dataclass(frozen=True)
class Guidance:
    """What guides one denoising step.

    Attributes:
        condition: One row per image, or the rows of the negative prompt and then those of each part.
        weights: Weight of each part; the prediction is negative + scale * sum of weight * (part - negative).
    """

    condition: Conditioning
    weights: tuple[float, ...] = (1.0,)

    def predict(self, base: BaseModel, latents: Tensor, timestep: Tensor, scale: float) -> Tensor:
        """Returns the guided prediction for scaled latents [n, channels, height, width]; see `Guide.predict`."""
        copies = len(self.condition) // len(latents)
        inputs = torch.cat([latents] * copies)
        prediction = base.predict(inputs, timestep.to(base.device).expand(len(inputs)), self.condition)
        if copies == 1:
            return prediction
        negative, *parts = prediction.chunk(copies)
        return negative + scale * sum_weighted([part - negative for part in parts], self.weights)


class Guide(Protocol):
    """What predicts one denoising step."""

    def predict(self, base: BaseModel, latents: Tensor, timestep: Tensor, scale: float) -> Tensor:
        """Returns the prediction.

        Args:
            base: The model.
            latents: As the sampler scales them for the network, [n, channels, height, width].
            timestep: The timestep, a scalar.
            scale: Scale of classifier-free guidance.
        """
        ...


OnStep = Callable[[int, int, Tensor], None]
"""Takes the number of finished steps, that of all, and the latents; may raise to stop."""


def ignore_step(done: int, total: int, latents: Tensor) -> None:
    """Does nothing after a step."""
    del done, total, latents


def sample(
    base: BaseModel,
    noise: Tensor,
    guidance: Callable[[int], Guide],
    *,
    seeds: Sequence[int],
    steps: int,
    scale: float,
    size: tuple[int, int],
    sampler: str | None = None,
    start: Start | None = None,
    on_step: OnStep = ignore_step,
) -> Tensor:
    """Denoises latents.

    Args:
        base: The model.
        noise: Standard normal noise [n, channels, height, width].
        guidance: Called before each prediction with the number of its step from 0.
        seeds: One per image; each seeds a generator of its own, so that the noise of a step does not depend on the
            batch.
        steps: Denoising steps.
        scale: Scale of classifier-free guidance; unused if the conditions have no negative rows.
        size: (height, width) of the images in pixels.
        sampler: See `find_sampler`; None is the base's own.
        start: What to start from; None starts from the noise alone.
        on_step: Called after each step.
    """
    scheduler = base.scheduler(steps, size, sampler)
    draws = [torch.Generator().manual_seed(derive_seed(seed, "steps")) for seed in seeds]
    options = {"generator": draws} if sampler and find_sampler(sampler).draws_noise else {}
    # Flow matching starts from unscaled noise, and its network takes the latents unscaled.
    scaled = base.noise.parameterization != "flow"
    timesteps = scheduler.timesteps
    # Samplers of second order predict more than once per step.
    step_of = [number * steps // len(timesteps) for number in range(len(timesteps))]
    first = 0 if start is None else step_of.index(start.first_step(steps))
    if start is not None and first:
        if hasattr(scheduler, "set_begin_index"):  # of schedulers that count their steps
            scheduler.set_begin_index(first)
        latents = start.noisy(scheduler, noise, timesteps[first])
    else:
        latents = noise * float(scheduler.init_noise_sigma) if scaled else noise
    for number, step in enumerate(timesteps[first:], first):
        inputs = scheduler.scale_model_input(latents, step) if scaled else latents
        prediction = guidance(step_of[number]).predict(base, inputs, step, scale)
        latents = scheduler.step(prediction, step, latents, return_dict=False, **options)[0]
        if start is not None:
            latents = start.blend(latents, scheduler, noise, timesteps[number + 1 :])
        on_step(step_of[number] + 1, steps, latents)
    return latents


def _same(guidance: Guidance, step: int) -> Guidance:
    del step
    return guidance


def sum_weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns the weighted sum; a single value with weight 1 unchanged."""
    total = values[0] if weights[0] == 1.0 else weights[0] * values[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + weight * value
    return total
