"""Draws images from a prompt that was read: adapters with weights over steps and blocks, and texts that change.

Texts are encoded once, before the first step, with the text encoders' weights of that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.inference.composition import Composition
from lora_engine.inference.generate import OnStep, draw_noise, ignore_step, sample
from lora_engine.inference.passes import Passes
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.inference.regions import Regions
from lora_engine.inference.source_image import SourceImage
from lora_engine.progress import Progress, no_progress


@torch.no_grad()
def generate_composed(
    base: BaseModel,
    prompt: ParsedPrompt,
    composition: Composition,
    *,
    negative: ParsedPrompt,
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 3.0,
    height: int | None = None,
    width: int | None = None,
    batch: int = 8,
    sampler: str | None = None,
    source: SourceImage | None = None,
    noise: Tensor | None = None,
    progress: Progress = no_progress,
    on_step: OnStep = ignore_step,
    regions: Regions | None = None,
) -> Tensor:
    """Generates one image per seed; see `generate`.

    Args:
        base: The model, with the adapters of the composition.
        prompt: The prompt.
        composition: The adapters.
        negative: The negative prompt; unused without guidance.
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 or less is none, unless AND divides the prompt.
        height: In pixels; None takes the base's default.
        width: In pixels; None takes the base's default.
        batch: Images per batch.
        sampler: See `find_sampler`; None is the base's own.
        source: An image of that size to start from; None starts from noise.
        noise: Standard normal noise, one row per image; None draws it from the seeds.
        progress: Called after each batch.
        on_step: Called after each step of each batch.
        regions: Regions with prompts and adapters of their own, which are among those of the composition.

    Returns:
        float32 [n, 3, height, width] in [-1, 1], on the CPU.

    Raises:
        SettingsError: The base cannot generate the size, or cannot read weights of words, BREAK or AND.
    """
    size = (height or base.default_size[0], width or base.default_size[1])
    shape = base.latent_shape(size)
    passes = Passes(
        base,
        composition,
        prompt,
        negative,
        areas=regions.areas(size) if regions is not None else [],
        size=size,
        steps=steps,
        guidance=guidance,
        mask=None if source is None else source.conditioning(base),
        is_enlarged=source is not None and source.is_enlarged,
    )
    images: list[Tensor] = []
    for first in range(0, len(seeds), batch):
        chosen = seeds[first : first + batch]
        drawn = torch.stack([draw_noise(shape, seed) for seed in chosen]) if noise is None else noise[first:][:batch]
        start = None if source is None else source.start(base, len(chosen))
        latents = sample(
            base,
            drawn.to(base.device),
            partial(passes.at, rows=len(chosen)),
            seeds=chosen,
            steps=steps,
            scale=guidance,
            size=size,
            sampler=sampler,
            start=start,
            on_step=on_step,
        )
        pixels = base.decode_latents(latents).clamp(-1.0, 1.0).float().cpu()
        images.append(pixels if source is None else source.keep_unmasked(pixels))
        progress(min(first + batch, len(seeds)), len(seeds), {})
    return torch.cat(images) if images else torch.empty(0, 3, *size)
