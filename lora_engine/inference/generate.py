"""Images from prompts: the plain sampler with classifier-free guidance. Adapters are attached by the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel, masked_whole
from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import SettingsError
from lora_engine.progress import Progress


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
    progress: Progress | None = None,
) -> Tensor:
    """Draws one picture a prompt.

    A picture depends on the weights, its prompt, its seed and the settings, not on the seeds of its neighbours.

    Args:
        base: The model, with whatever is attached to it.
        prompts: One a picture.
        seeds: One a picture; each seeds a generator of its own, on the CPU, so that devices agree.
        steps: Of the sampler.
        guidance: Classifier-free guidance (Ho & Salimans 2022); at 1 or below the prompt alone is followed. A base with
            distilled guidance is told the number instead, where it reads one.
        height: In pixels; None takes the base's own.
        width: In pixels; None takes the base's own.
        negative: What to lead away from; a base with distilled guidance does not read it.
        batch: Images at once.
        masks: For inpainting bases, what `encode_mask` gives, one row a picture; None draws the whole picture anew.
        progress: Told after each batch: pictures done, pictures in all.

    Returns:
        float32 [n, 3, height, width] in [-1, 1], on the CPU.

    Raises:
        SettingsError: Counts that do not match, a size that the base cannot make, or masks for a base that reads none.
    """
    if len(seeds) != len(prompts):
        raise SettingsError(f"there are {len(prompts)} prompts and {len(seeds)} seeds", allowed="one seed a prompt")
    if steps < 1 or batch < 1:
        raise SettingsError(f"steps is {steps} and batch is {batch}", allowed="1 or more")
    size = (height or base.default_size[0], width or base.default_size[1])
    shape = base.latent_shape(size)
    if masks is not None and (not base.inpaints or len(masks) != len(prompts)):
        raise SettingsError(
            f"there are {len(masks)} masks and {len(prompts)} prompts" if base.inpaints else "masks were given",
            allowed="one mask a prompt, and a base that is made for inpainting",
        )
    pictures: list[Tensor] = []
    for first in range(0, len(prompts), batch):
        chosen = slice(first, first + batch)
        condition = _conditions(base, prompts[chosen], negative, size, guidance)
        if masks is None:
            condition = masked_whole(base, condition, size)
        else:
            rows = list(range(first, first + len(prompts[chosen])))
            condition = condition.with_tensors(masks.index(rows * (len(condition) // len(rows))))
        start = torch.stack([draw_noise(shape, seed) for seed in seeds[chosen]]).to(base.device)
        latents = _sample(base, start, condition, steps, guidance, size)
        pictures.append(base.decode_latents(latents).clamp(-1.0, 1.0).float().cpu())
        if progress is not None:
            progress(min(first + batch, len(prompts)), len(prompts), {})
    return torch.cat(pictures) if pictures else torch.empty(0, 3, *size)


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise of that shape, a pure function of the seed (taken modulo 2^63)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed % (1 << 63)))


def _conditions(
    base: BaseModel, prompts: Sequence[str], negative: str, size: tuple[int, int], guidance: float
) -> Conditioning:
    followed = base.encode_text(prompts, size)
    if base.distilled:
        scales = torch.full((len(prompts),), guidance, dtype=torch.float32, device=base.device)
        return followed.with_tensors(Conditioning({"guidance": scales}))
    if guidance <= 1.0:
        return followed
    return Conditioning.cat([base.encode_negative([negative], size).index([0] * len(prompts)), followed])


def _sample(
    base: BaseModel, noise: Tensor, condition: Conditioning, steps: int, guidance: float, size: tuple[int, int]
) -> Tensor:
    scheduler = base.scheduler(steps, size)
    # A flow begins with plain noise, and its network reads what the sampler holds as it is.
    scaled = base.noise.parameterisation != "flow"
    latents = noise * float(scheduler.init_noise_sigma) if scaled else noise
    copies = len(condition) // len(noise)
    for step in scheduler.timesteps:
        entering = torch.cat([latents] * copies)
        if scaled:
            entering = scheduler.scale_model_input(entering, step)
        found = base.predict(entering, step.to(base.device).expand(len(entering)), condition)
        if copies == 2:
            away, towards = found.chunk(2)
            found = away + guidance * (towards - away)
        latents = scheduler.step(found, step, latents, return_dict=False)[0]
    return latents
