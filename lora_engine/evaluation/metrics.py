"""Computes the metrics: functions from evidence to paired values. Their descriptions are in `catalogue`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_engine.evaluation.embedder import Embedder
from lora_engine.evaluation.plan import Request
from lora_engine.evaluation.statistics import Values
from lora_engine.registries import Registry


@dataclass(frozen=True)
class ImagePair:
    """The images of base and adapter for one request, with the same seeds.

    Attributes:
        request: The request.
        base: uint8 [seeds, 3, height, width].
        adapter: The same with the adapter attached.
        reference: The real image, float32 [3, height, width] in [-1, 1]; None if the request has none.
    """

    request: Request
    base: Tensor
    adapter: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """The input of the metrics.

    Attributes:
        reference: Images for the captions of real images.
        with_trigger: Images for the prompts.
        without_trigger: Images for the prompts without the trigger.
        losses: Denoising losses of base and adapter, one value per real image.
        embedder: The embedder of images and texts.
    """

    reference: tuple[ImagePair, ...]
    with_trigger: tuple[ImagePair, ...]
    without_trigger: tuple[ImagePair, ...]
    losses: tuple[Values, Values]
    embedder: Embedder


Pair = tuple[Values, Values]
Metric = Callable[[Evidence], Pair]
METRICS: Registry[Metric] = Registry("metric")


def clip_i_paired(evidence: Evidence) -> Pair:
    """Returns the cosine of a generated image and the real image of the same caption (unpaired means mislead)."""

    def likeness(pair: ImagePair, images: Tensor) -> Tensor:
        if pair.reference is None:
            raise ValueError(f"the request {pair.request.prompt!r} has no reference image")
        return _embed(evidence, images) @ evidence.embedder.embed_images(pair.reference[None])[0]

    return _by_prompt(evidence.reference, likeness)


def clip_t(evidence: Evidence) -> Pair:
    """Returns the cosine of a generated image and its prompt without the trigger, which no embedder knows."""

    def agreement(pair: ImagePair, images: Tensor) -> Tensor:
        return _embed(evidence, images) @ evidence.embedder.embed_texts([pair.request.prompt_without_trigger])[0]

    return _by_prompt(evidence.with_trigger, agreement)


def drift(evidence: Evidence) -> Pair:
    """Returns 1 - cosine to the base's image of the same seed, on prompts without the trigger; 0 for the base."""

    def distance(pair: ImagePair, images: Tensor) -> Tensor:
        return 1.0 - (_embed(evidence, images) * _embed(evidence, pair.base)).sum(dim=-1)

    return _from_zero(_by_prompt(evidence.without_trigger, distance))


def drift_pixels(evidence: Evidence) -> Pair:
    """Returns the root mean square difference to the base's image of the same seed, as a share of the full range."""

    def distance(pair: ImagePair, images: Tensor) -> Tensor:
        difference = (images.double() - pair.base.double()) / 255.0
        return difference.square().mean(dim=(1, 2, 3)).sqrt()

    return _by_prompt(evidence.without_trigger, distance)


def validation_loss(evidence: Evidence) -> Pair:
    """Returns the denoising losses on the fixed grid of time steps, one value per real image."""
    return evidence.losses


METRICS.add("clip_i_paired", clip_i_paired)
METRICS.add("clip_t", clip_t)
METRICS.add("drift", drift)
METRICS.add("drift_pixels", drift_pixels)
METRICS.add("validation_loss", validation_loss)


def _embed(evidence: Evidence, images: Tensor) -> Tensor:
    return evidence.embedder.embed_images(images.float() / 127.5 - 1.0)


def _by_prompt(pairs: tuple[ImagePair, ...], value: Callable[[ImagePair, Tensor], Tensor]) -> Pair:
    # Images of one prompt are not independent: the unit of resampling is the prompt, with the mean over its seeds.
    # With a single prompt the seeds are the units.
    base = [value(pair, pair.base) for pair in pairs]
    adapter = [value(pair, pair.adapter) for pair in pairs]
    if len(pairs) == 1:
        return _to_numpy(base[0]), _to_numpy(adapter[0])
    return _to_numpy(torch.stack([v.mean() for v in base])), _to_numpy(torch.stack([v.mean() for v in adapter]))


def _to_numpy(values: Tensor) -> Values:
    return values.double().numpy()


def _from_zero(pair: Pair) -> Pair:
    # Rounding makes the cosine of a vector with itself slightly less or more than 1; a distance is never below 0.
    base, adapter = pair
    return np.zeros_like(base), np.maximum(adapter, 0.0)
