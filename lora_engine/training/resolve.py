"""Resolves the settings of a training: lengths in steps, and the options of the loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_engine.bases.options import BaseOptions
from lora_engine.bases.vae import resolve_vae
from lora_engine.errors import SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.training.automatic import limit_steps
from lora_engine.training.choosing import Chooser
from lora_engine.training.continuing import later_stages
from lora_engine.training.examples import Example
from lora_engine.training.fit_options import FitOptions
from lora_engine.training.images import TrainingImages
from lora_engine.training.spec import TrainSettings

# A mean over pixels makes gradients underflow float16. A power of two is exact.
_FP16_LOSS_SCALE = 4096.0


def count_epoch(settings: TrainSettings, examples: Sequence[Example]) -> int:
    """Returns the steps of an epoch, in which every example is seen at least as often as it repeats."""
    prior = settings.class_images
    batches = 2 if prior is not None and prior.batches == "alternating" else 1
    count = sum(example.repeats for example in examples) * batches
    return math.ceil(count / (settings.batch * settings.accumulate))


def base_options(settings: TrainSettings, vae: str | None) -> BaseOptions:
    """Returns what a training changes of its base.

    Args:
        settings: Settings of the run.
        vae: Name of another autoencoder for `resolve_vae`; None keeps that of the base.

    Raises:
        BaseModelError: There is no such autoencoder.
    """
    other = resolve_vae(vae) if vae else None
    return BaseOptions(settings.clip_skip, settings.prediction, settings.zero_terminal_snr, other)


def in_steps(settings: TrainSettings, epoch: int) -> TrainSettings:
    """Returns the settings with all lengths in steps; `steps: auto` becomes the longest training.

    Raises:
        SettingsError: A warmup does not fit the steps.
    """
    try:
        return limit_steps(settings, epoch).in_steps(epoch)
    except ValueError as error:
        raise SettingsError(str(error), where="warmup") from error


def fit_options(settings: TrainSettings, images: TrainingImages, chooser: Chooser | None = None) -> FitOptions:
    """Returns the options of the loop; all lengths are in steps."""
    heldout: list[Any] = [example.identity() for example in images.heldout]
    if settings.method.mask is not None and any(example.mask for example in images.heldout):
        heldout.append({"mask": settings.method.mask.model_dump(mode="json")})
    return FitOptions(
        schedule=settings.schedule.name,
        schedule_options=settings.schedule.options(),
        warmup=settings.warmup,
        then=later_stages(settings),
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        accumulate=settings.accumulate,
        checkpoint_every=settings.checkpoint_every,
        validate_every=settings.validate_every,
        save_every=settings.save_every,
        observe_every=settings.samples.every if settings.samples else 0,
        optimizer=settings.rates.optimiser.name,
        optimizer_options=settings.rates.optimiser.options(),
        ema=settings.rates.ema,
        loss_scale=_FP16_LOSS_SCALE if settings.precision == "fp16" else 1.0,
        chooser=chooser,
        validated_on=sha256_bytes(canonical_json(heldout)) if heldout else "",
    )
