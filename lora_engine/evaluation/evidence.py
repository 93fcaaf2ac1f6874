"""Generates images and computes losses for the metrics: same prompts, seeds and noise for base and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lora_engine.adapters.attachment import attach
from lora_engine.bases.base import full_mask_conditioning
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import AdapterError, BaseModelError
from lora_engine.evaluation.embedder import Embedder
from lora_engine.evaluation.metrics import Evidence, ImagePair
from lora_engine.evaluation.plan import EvaluationPlan, Request, derive_evaluation_seed
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.evaluation.statistics import Values
from lora_engine.framing import Framing
from lora_engine.inference.generate import generate
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress

if TYPE_CHECKING:
    from lora_engine.bases.base import BaseModel
    from lora_engine.formats import Bundle

GRID = 10
"""Number of time steps of the validation loss, evenly spaced."""

_Images = dict[tuple[str, int], Tensor]


def gather_evidence(
    settings: EvaluateSettings,
    plan: EvaluationPlan,
    *,
    model: BaseModel,
    bundle: Bundle,
    embedder: Embedder,
    progress: Progress,
) -> Evidence:
    """Generates all images twice, without and with the adapter; the model is unchanged afterwards.

    Args:
        settings: See `EvaluateSettings`.
        plan: The requests.
        model: The base, with nothing attached.
        bundle: The adapter and its learned tokens.
        embedder: The embedder of the metrics.
        progress: Counts images and losses of both models.

    Raises:
        BaseModelError: The base alone produces NaN or Inf.
        AdapterError: The base with the adapter produces NaN or Inf.
    """
    keys = list(dict.fromkeys((r.prompt, seed) for r in plan.all_requests() for seed in r.seeds))
    total = 2 * (len(keys) + len(plan.reference))
    count = _Counter(progress, total)
    before = _generate(settings, plan, model, keys, count), _losses(settings, plan, model, count)
    with ExitStack() as stack:
        if bundle.adapter.modules:
            stack.enter_context(attach(model, bundle.adapter))
        stack.enter_context(attach_embeddings(model, bundle.embeddings))
        after = _generate(settings, plan, model, keys, count), _losses(settings, plan, model, count)
    for (images, losses), error, name in ((before, BaseModelError, "the base"), (after, AdapterError, "the adapter")):
        if not np.isfinite(losses).all() or not all(key in images for key in keys):
            raise error(
                f"images or losses of {name} contain NaN or Inf", remedy="train again with a lower learning rate"
            )

    def pairs(requests: Sequence[Request]) -> tuple[ImagePair, ...]:
        return tuple(
            ImagePair(
                request,
                base=torch.stack([before[0][request.prompt, seed] for seed in request.seeds]),
                adapter=torch.stack([after[0][request.prompt, seed] for seed in request.seeds]),
                reference=read_pixels(plan.folder / request.image.file) if request.image else None,
            )
            for request in requests
        )

    return Evidence(
        pairs(plan.reference), pairs(plan.with_trigger), pairs(plan.without_trigger), (before[1], after[1]), embedder
    )


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total, {})


def _generate(
    settings: EvaluateSettings, plan: EvaluationPlan, model: BaseModel, keys: Sequence[tuple[str, int]], count: _Counter
) -> _Images:
    height, width = plan.size
    images: _Images = {}
    batch = 8 if height * width <= 512 * 512 else 2
    for start in range(0, len(keys), batch):
        part = keys[start : start + batch]
        pixels = generate(
            model,
            [prompt for prompt, _ in part],
            seeds=[seed for _, seed in part],
            steps=settings.steps,
            guidance=settings.guidance,
            height=height,
            width=width,
            batch=batch,
        )
        for key, image in zip(part, pixels, strict=True):
            # uint8 takes a quarter of the memory and equals the saved PNG. The caller reports NaN.
            if bool(torch.isfinite(image).all()):
                images[key] = ((image.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        count.add(len(part))
    return images


@torch.inference_mode()
def _losses(settings: EvaluateSettings, plan: EvaluationPlan, model: BaseModel, count: _Counter) -> Values:
    steps = torch.tensor([int((k + 0.5) / GRID * model.noise.timesteps) for k in range(GRID)], device=model.device)
    losses: list[float] = []
    for request in plan.reference:
        if request.image is None:
            continue
        latents = model.encode_images(read_pixels(plan.folder / request.image.file)[None]).float()
        seed = derive_evaluation_seed(settings.seed, "noise", request.image.sha256)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(GRID, *latents.shape[1:], generator=generator).to(latents.device)
        clean = latents.expand(GRID, -1, -1, -1)
        shown = request.image.framing or Framing.whole(plan.size)
        text = model.with_framings(model.encode_text([request.prompt], plan.size), [shown]).index([0] * GRID)
        condition = full_mask_conditioning(model, text, plan.size)
        prediction = model.predict(model.noise.add_noise(clean, noise, steps), steps, condition)
        residual = prediction.float() - model.noise.target(clean, noise, steps)
        losses.append(float(residual.square().mean()))
        count.add(1)
    return np.asarray(losses, dtype=np.float64)
