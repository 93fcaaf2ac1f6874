"""Generates images and computes losses for the metrics: same prompts, seeds and noise for every compared model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.adapters.attachment import attach
from lora_engine.bases.base import full_mask_conditioning
from lora_engine.data.pixels import read_mask, read_pixels
from lora_engine.errors import AdapterError, BaseModelError
from lora_engine.evaluation.evidence import BASE, CANDIDATE, ImageSet, Losses, RequestSet
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
MAX_SWEPT = 4
"""Largest number of prompts that are drawn at several strengths."""

_Key = tuple[str, int, tuple[int, int]]
"""Prompt, seed and size of an image."""


@dataclass(frozen=True)
class Drawn:
    """What was generated and computed.

    Attributes:
        sets: The images by set of requests.
        heldout: Losses on the real images, in the order of the requests.
        training: Losses on training images; None without any.
        strengths: The candidate's images at the strengths of the settings.
    """

    sets: Mapping[RequestSet, tuple[ImageSet, ...]]
    heldout: Losses
    training: Losses | None = None
    strengths: tuple[StrengthImages, ...] = ()


@dataclass(frozen=True)
class StrengthImages:
    """The images of the first prompts at one strength of the candidate.

    Attributes:
        strength: Factor of the adapter.
        images: One per request, uint8 [3, height, width].
        equals_base: True if they equal the base's bit for bit, before they are rounded.
    """

    strength: float
    images: tuple[Tensor, ...]
    equals_base: bool


def draw_evaluation(
    settings: EvaluateSettings,
    plan: EvaluationPlan,
    *,
    model: BaseModel,
    bundles: Mapping[str, Sequence[Bundle]],
    progress: Progress,
) -> Drawn:
    """Generates all images by every model; the base is unchanged afterwards.

    Args:
        settings: See `EvaluateSettings`.
        plan: The requests.
        model: The base, with nothing attached.
        bundles: Role -> the adapters that are attached together, with their learned tokens; none for the base alone.
        progress: Counts images and losses of all models.

    Raises:
        BaseModelError: The base alone produces NaN or Inf.
        AdapterError: The base with an adapter produces NaN or Inf.
    """
    keys = list(dict.fromkeys((r.prompt, seed, r.size) for r in plan.all_requests() for seed in r.seeds))
    swept = plan.with_trigger[:MAX_SWEPT] if settings.strengths else ()
    shown = len(swept) * (len(settings.strengths) + 1)
    count = _Counter(progress, len(bundles) * (len(keys) + len(plan.reference) + len(plan.training)) + shown)
    images: dict[str, dict[_Key, Tensor]] = {}
    losses: dict[str, Values] = {}
    training: dict[str, Values] = {}
    for role, attached in bundles.items():
        with _attached(model, attached):
            images[role] = _generate(settings, model, keys, count)
            losses[role] = _losses(settings, plan.reference, model, count)
            training[role] = _losses(settings, plan.training, model, count)
        if not np.isfinite(losses[role]).all() or len(images[role]) < len(keys):
            raise (BaseModelError if role == BASE else AdapterError)(
                f"images or losses of the {role} contain NaN or Inf", remedy="train again with a lower learning rate"
            )

    def sets(requests: Sequence[Request]) -> tuple[ImageSet, ...]:
        return tuple(_image_set(request, images) for request in requests)

    own: dict[RequestSet, tuple[Request, ...]] = {
        "reference": plan.reference,
        "with_trigger": plan.with_trigger,
        "without_trigger": plan.without_trigger,
    }
    timesteps = tuple(_timesteps(model))
    return Drawn(
        {name: sets(requests) for name, requests in {**own, **plan.further}.items()},
        Losses(losses, timesteps, tuple(request.group for request in plan.reference)),
        Losses(training, timesteps, tuple(request.group for request in plan.training)) if plan.training else None,
        _draw_strengths(settings, model, bundles[CANDIDATE], swept, count) if swept else (),
    )


def _draw_strengths(
    settings: EvaluateSettings,
    model: BaseModel,
    bundles: Sequence[Bundle],
    requests: Sequence[Request],
    count: _Counter,
) -> tuple[StrengthImages, ...]:
    keys = [(request.prompt, request.seeds[0], request.size) for request in requests]

    def drawn() -> list[Tensor]:
        pixels = dict(_generate_pixels(settings, model, keys, count))
        return [pixels[key] for key in keys]

    base = drawn()
    entries = []
    for strength in sorted(set(settings.strengths)):
        with _attached(model, bundles, strength):
            images = drawn()
        equal = all(torch.equal(one, other) for one, other in zip(images, base, strict=True))
        entries.append(StrengthImages(strength, tuple(_to_bytes(image) for image in images), equal))
    return tuple(entries)


@contextmanager
def _attached(model: BaseModel, bundles: Sequence[Bundle], strength: float = 1.0) -> Iterator[None]:
    with ExitStack() as stack:
        for bundle in bundles:
            if bundle.adapter.modules:
                stack.enter_context(attach(model, bundle.adapter, strength))
        # After the last adapter and all at once: they wrap the input embedding.
        embeddings = [embedding for bundle in bundles for embedding in bundle.embeddings]
        stack.enter_context(attach_embeddings(model, embeddings))
        yield


def _image_set(request: Request, images: Mapping[str, Mapping[_Key, Tensor]]) -> ImageSet:
    keys = [(request.prompt, seed, request.size) for seed in request.seeds]
    return ImageSet(
        request,
        {role: torch.stack([drawn[key] for key in keys]) for role, drawn in images.items()},
        reference=read_pixels(request.file) if request.file else None,
        mask=read_mask(request.mask) if request.mask else None,
    )


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total, {})


def _generate(
    settings: EvaluateSettings, model: BaseModel, keys: Sequence[_Key], count: _Counter
) -> dict[_Key, Tensor]:
    # uint8 takes a quarter of the memory and equals the saved PNG. The caller reports NaN.
    return {
        key: _to_bytes(image)
        for key, image in _generate_pixels(settings, model, keys, count)
        if bool(torch.isfinite(image).all())
    }


def _generate_pixels(
    settings: EvaluateSettings, model: BaseModel, keys: Sequence[_Key], count: _Counter
) -> Iterator[tuple[_Key, Tensor]]:
    for part in _batches(keys):
        height, width = part[0][2]
        pixels = generate(
            model,
            [prompt for prompt, _, _ in part],
            seeds=[seed for _, seed, _ in part],
            steps=settings.steps,
            guidance=settings.guidance,
            height=height,
            width=width,
            batch=len(part),
        )
        yield from zip(part, pixels, strict=True)
        count.add(len(part))


def _to_bytes(image: Tensor) -> Tensor:
    return ((image.nan_to_num().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _batches(keys: Sequence[_Key]) -> Iterator[list[_Key]]:
    """Yields batches of images of one size."""
    for (height, width), group in groupby(sorted(keys, key=lambda key: key[2]), key=lambda key: key[2]):
        same = list(group)
        batch = 8 if height * width <= 512 * 512 else 2
        yield from (same[start : start + batch] for start in range(0, len(same), batch))


def _timesteps(model: BaseModel) -> list[int]:
    return [int((k + 0.5) / GRID * model.noise.timesteps) for k in range(GRID)]


@torch.inference_mode()
def _losses(settings: EvaluateSettings, requests: Sequence[Request], model: BaseModel, count: _Counter) -> Values:
    """Returns the losses on the real images of the requests, float64 [images, GRID]."""
    steps = torch.tensor(_timesteps(model), device=model.device)
    losses = np.zeros((len(requests), GRID), dtype=np.float64)
    for row, request in enumerate(requests):
        if request.file is None:
            raise ValueError(f"the request {request.prompt!r} has no reference image")
        latents = model.encode_images(read_pixels(request.file)[None]).float()
        seed = derive_evaluation_seed(settings.seed, "noise", request.image)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(GRID, *latents.shape[1:], generator=generator).to(latents.device)
        clean = latents.expand(GRID, -1, -1, -1)
        shown = request.framing or Framing.whole(request.size)
        text = model.with_framings(model.encode_text([request.prompt], request.size), [shown]).index([0] * GRID)
        condition = full_mask_conditioning(model, text, request.size)
        prediction = model.predict(model.noise.add_noise(clean, noise, steps), steps, condition)
        squared = (prediction.float() - model.noise.target(clean, noise, steps)).square()
        losses[row] = _mean(squared, read_mask(request.mask) if request.mask else None).double().cpu().numpy()
        count.add(1)
    return losses


def _mean(squared: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the mean of squared residuals [n, c, h, w] per row; a mask [1, height, width] weights the positions."""
    means = squared.mean(dim=1)
    weights = torch.ones_like(means[0])
    if mask is not None:
        covered = F.interpolate(mask[None], means.shape[1:], mode="area")[0, 0].to(means.device)
        weights = covered if float(covered.sum()) > 0.0 else weights  # a mask without any pixel weights all alike
    return (means * weights).sum(dim=(1, 2)) / weights.sum()
