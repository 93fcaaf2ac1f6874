"""The metrics: small functions from evidence to paired numbers. What they mean in words is in `catalogue`."""

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
    """What base and adapter drew for one request, with the same seeds.

    Attributes:
        request: What was asked for.
        base: uint8 [seeds, 3, height, width].
        adapter: The same with the adapter attached.
        reference: float32 [3, height, width] in [-1, 1], the real picture of a paired request.
    """

    request: Request
    base: Tensor
    adapter: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything that metrics look at.

    Attributes:
        paired: Captions of real pictures.
        asked: The prompts.
        unasked: The prompts without the trigger.
        losses: Denoising losses of base and adapter, one value a real picture.
        embedder: What sees.
    """

    paired: tuple[ImagePair, ...]
    asked: tuple[ImagePair, ...]
    unasked: tuple[ImagePair, ...]
    losses: tuple[Values, Values]
    embedder: Embedder


Pair = tuple[Values, Values]
Metric = Callable[[Evidence], Pair]
METRICS: Registry[Metric] = Registry("metric")


def clip_i_paired(evidence: Evidence) -> Pair:
    """Cosine of a generated picture and the real picture of the same caption (unpaired means mislead)."""

    def likeness(shots: ImagePair, drawn: Tensor) -> Tensor:
        if shots.reference is None:
            raise ValueError(f"the paired request {shots.request.prompt!r} has no real picture")
        return _see(evidence, drawn) @ evidence.embedder.embed_images(shots.reference[None])[0]

    return _by_prompt(evidence.paired, likeness)


def clip_t(evidence: Evidence) -> Pair:
    """Cosine of a generated picture and its prompt, read without the trigger, which no embedder knows."""

    def agreement(shots: ImagePair, drawn: Tensor) -> Tensor:
        return _see(evidence, drawn) @ evidence.embedder.embed_texts([shots.request.reading])[0]

    return _by_prompt(evidence.asked, agreement)


def drift(evidence: Evidence) -> Pair:
    """1 - cosine to the base's picture of the same seed, on prompts without the trigger; the base's own is 0."""

    def distance(shots: ImagePair, drawn: Tensor) -> Tensor:
        return 1.0 - (_see(evidence, drawn) * _see(evidence, shots.base)).sum(dim=-1)

    return _from_zero(_by_prompt(evidence.unasked, distance))


def drift_pixels(evidence: Evidence) -> Pair:
    """Root mean square difference to the base's picture of the same seed, as a share of the full range."""

    def distance(shots: ImagePair, drawn: Tensor) -> Tensor:
        gap = (drawn.double() - shots.base.double()) / 255.0
        return gap.square().mean(dim=(1, 2, 3)).sqrt()

    return _by_prompt(evidence.unasked, distance)


def validation_loss(evidence: Evidence) -> Pair:
    """The denoising loss on the fixed grid, one value a real picture."""
    return evidence.losses


METRICS.add("clip_i_paired", clip_i_paired)
METRICS.add("clip_t", clip_t)
METRICS.add("drift", drift)
METRICS.add("drift_pixels", drift_pixels)
METRICS.add("validation_loss", validation_loss)


def _see(evidence: Evidence, drawn: Tensor) -> Tensor:
    return evidence.embedder.embed_images(drawn.float() / 127.5 - 1.0)


def _by_prompt(shots: tuple[ImagePair, ...], value: Callable[[ImagePair, Tensor], Tensor]) -> Pair:
    # Images of one prompt are not independent of each other: the unit of resampling is the prompt, and its value
    # the mean over its seeds. A single prompt leaves its seeds as units.
    base = [value(item, item.base) for item in shots]
    adapter = [value(item, item.adapter) for item in shots]
    if len(shots) == 1:
        return _numbers(base[0]), _numbers(adapter[0])
    return _numbers(torch.stack([v.mean() for v in base])), _numbers(torch.stack([v.mean() for v in adapter]))


def _numbers(values: Tensor) -> Values:
    return values.double().numpy()


def _from_zero(pair: Pair) -> Pair:
    # The cosine of a vector with itself is 1 only up to rounding; no distance is below 0.
    base, adapter = pair
    return np.zeros_like(base), np.maximum(adapter, 0.0)
