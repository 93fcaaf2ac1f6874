"""The denoising phase, which all methods share: from noisy images to the noise (or velocity), with all options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.seeds import derive_seed
from lora_engine.training.batches import Batch, BatchBuilder
from lora_engine.training.examples import Example
from lora_engine.training.losses import DenoisingLoss, LossTerm, PriorLoss
from lora_engine.training.masks import mask_transform
from lora_engine.training.objective import measure_for, noisy_and_target
from lora_engine.training.phases import ParameterGroup, Phase, no_context, no_hook
from lora_engine.training.preservation import OutputPreservation
from lora_engine.training.rates import groups_for

if TYPE_CHECKING:
    from lora_engine.training.methods.context import BatchTransform, MethodContext


def predict(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the network's prediction for a batch's noisy latents, and the target."""
    noisy, target = noisy_and_target(base.noise, batch)
    return base.predict(noisy, batch.timesteps, batch.conditioning), target


def denoising_phase(
    context: MethodContext,
    name: str,
    *,
    steps: int | None = None,
    groups: Sequence[ParameterGroup] | None = None,
    transforms: Sequence[BatchTransform] = (),
    after_step: Callable[[float], None] = no_hook,
) -> Phase:
    """Returns a phase that minimizes the denoising loss, with all options that the settings add.

    Args:
        context: See `MethodContext`.
        name: Name of the phase, which its dropout is seeded with.
        steps: Optimizer steps; None is all steps of the settings.
        groups: Trained parameters; None is the adapter's factors at the settings' rates.
        transforms: Transforms that the method applies to each batch.
        after_step: See `Phase`.
    """
    settings = context.settings
    preservation = OutputPreservation.from_context(context)
    batch_transforms = [*transforms]
    if settings.method.mask is not None:
        batch_transforms.append(mask_transform(settings.method.mask))
    if preservation is not None:
        # Last, so that masks do not weight the rows that it adds.
        batch_transforms.append(preservation.add_rows)
    build = _batches(context)

    def make_batch(number: int) -> Batch:
        batch = build(number)
        for transform in batch_transforms:
            batch = transform(batch, number)
        return batch

    def predict_batch(batch: Batch) -> tuple[Tensor, Tensor]:
        predicted, target = predict(context.base, batch)
        return predicted, target if preservation is None else preservation.replace_targets(batch, target)

    return Phase(
        name=name,
        steps=settings.steps if steps is None else steps,
        groups=groups_for(context.parameters, settings.rates, settings.learning_rate)
        if groups is None
        else tuple(groups),
        batch=make_batch,
        predict=predict_batch,
        terms=_terms(context),
        batch_context=_dropout(context, name) if context.parameters else no_context,
        after_step=_with_norm_limit(context, after_step),
    )


def _terms(context: MethodContext) -> tuple[LossTerm, ...]:
    settings = context.settings
    prior, preservation = settings.class_images, settings.method.preservation
    measure = measure_for(settings.objective, context.base.noise)
    terms: tuple[LossTerm, ...] = (DenoisingLoss(measure),)
    if prior is not None:
        terms += (PriorLoss(prior.weight, measure),)
    if preservation is not None:
        terms += (PriorLoss(preservation.weight, measure, "preservation"),)
    return (*terms, *context.extra_terms)


def _batches(context: MethodContext) -> Callable[[int], Batch]:
    prior, seed = context.settings.class_images, context.settings.seed
    if prior is None or prior.batches == "joint":
        return _builder(context, context.examples, context.class_examples, seed)
    # Every second batch has class images only, in their own order and with their own noise.
    instances = _builder(context, context.examples, (), seed)
    classes = _builder(context, context.class_examples, (), derive_seed(seed, "class batches"))

    def alternate(number: int) -> Batch:
        index, is_class = divmod(number, 2)
        return replace(classes(index), instances=0) if is_class else instances(index)

    return alternate


def _builder(
    context: MethodContext, examples: Sequence[Example], class_examples: Sequence[Example], seed: int
) -> BatchBuilder:
    return BatchBuilder(
        context.base,
        context.latents,
        context.conditioner,
        examples,
        class_examples=class_examples,
        batch=context.settings.batch,
        seed=seed,
        caption_dropout=context.settings.caption_dropout,
        # Class images are not augmented.
        captions=context.settings.captions if examples is context.examples else None,
        objective=context.settings.objective,
        accumulate=context.settings.accumulate,
    )


def _dropout(context: MethodContext, phase: str) -> Callable[[int], AbstractContextManager[None]]:
    settings = context.settings
    others = {"ranks": settings.rank_dropout, "modules": settings.module_dropout}
    others = {name: share for name, share in others.items() if share}
    if not settings.dropout and not others:
        return no_context
    return lambda number: context.adapter_dropout(
        settings.dropout, derive_seed(settings.seed, "dropout", phase, number), **others
    )


def _with_norm_limit(context: MethodContext, after_step: Callable[[float], None]) -> Callable[[float], None]:
    limit, limit_norms = context.settings.norm_limit, context.limit_norms
    if limit is None or not context.parameters:
        return after_step
    if limit_norms is None:
        raise RuntimeError("norm_limit is set, but the context has no limit_norms")

    def hook(factor: float) -> None:
        after_step(factor)
        limit_norms(limit)

    return hook
