"""The phase that all methods are made of: noisy pictures in, the noise (or velocity) out, and what holds beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from lora_engine.seeds import derive_seed
from lora_engine.training.batches import Batch, Mixer
from lora_engine.training.examples import Example
from lora_engine.training.losses import DenoisingLoss, LossTerm, PriorLoss
from lora_engine.training.masks import masked_by
from lora_engine.training.methods.context import BatchTransform, MethodContext, predict
from lora_engine.training.objective import measure_for
from lora_engine.training.phases import ParameterGroup, Phase, no_surroundings, nothing_after
from lora_engine.training.preservation import Preserver
from lora_engine.training.rates import groups_for


def denoising_phase(
    context: MethodContext,
    name: str,
    *,
    steps: int | None = None,
    groups: Sequence[ParameterGroup] | None = None,
    dressings: Sequence[BatchTransform] = (),
    after: Callable[[float], None] = nothing_after,
) -> Phase:
    """A phase that lowers the denoising loss, with all that the settings put beside it.

    Args:
        bench: What it is made from.
        name: Of the phase; its dropout is drawn by it.
        steps: Optimizer steps; None for all of the settings'.
        groups: What moves; None for the adapter's factors at the settings' rate.
        dressings: What the method itself puts on a batch.
        after: See `Phase`.
    """
    settings = context.settings
    taught = Preserver.of(context)
    clothes = [*dressings]
    if settings.method.mask is not None:
        clothes.append(masked_by(settings.method.mask))
    if taught is not None:
        # Last: the rows that it adds count whole, whatever the pictures' own do.
        clothes.append(taught.add_rows)
    drawn = _batches(context)

    def batch(number: int) -> Batch:
        found = drawn(number)
        for transform in clothes:
            found = transform(found, number)
        return found

    def augmentation(found: Batch) -> tuple[Tensor, Tensor]:
        predicted, target = predict(context.base, found)
        return predicted, target if taught is None else taught.replace_targets(found, target)

    return Phase(
        name=name,
        steps=settings.steps if steps is None else steps,
        groups=groups_for(context.parameters, settings.rates, settings.learning_rate)
        if groups is None
        else tuple(groups),
        batch=batch,
        predict=augmentation,
        terms=_terms(context),
        around=_dropout(context, name) if settings.dropout and context.parameters else no_surroundings,
        after=after,
    )


def _terms(context: MethodContext) -> tuple[LossTerm, ...]:
    settings = context.settings
    prior, preservation = settings.class_images, settings.method.preservation
    measure = measure_for(settings.objective, context.base.noise)
    found: tuple[LossTerm, ...] = (DenoisingLoss(measure),)
    if prior is not None:
        found += (PriorLoss(prior.weight, measure),)
    if preservation is not None:
        found += (PriorLoss(preservation.weight, measure, "preservation"),)
    return (*found, *context.extra)


def _batches(context: MethodContext) -> Callable[[int], Batch]:
    prior, seed = context.settings.class_images, context.settings.seed
    if prior is None or prior.batches == "joint":
        return _mixer(context, context.examples, context.class_examples, seed)
    # Every second batch is of class pictures alone, in an order and a noise of their own.
    persons = _mixer(context, context.examples, (), seed)
    classes = _mixer(context, context.class_examples, (), derive_seed(seed, "class batches"))

    def alternate(number: int) -> Batch:
        place, is_class = divmod(number, 2)
        return replace(classes(place), instances=0) if is_class else persons(place)

    return alternate


def _mixer(context: MethodContext, examples: Sequence[Example], class_examples: Sequence[Example], seed: int) -> Mixer:
    return Mixer(
        context.base,
        context.latents,
        context.conditioner,
        examples,
        class_examples=class_examples,
        batch=context.settings.batch,
        seed=seed,
        caption_dropout=context.settings.caption_dropout,
        # Class pictures, where they stand alone, keep their captions and looks.
        captions=context.settings.captions if examples is context.examples else None,
        objective=context.settings.objective,
    )


def _dropout(context: MethodContext, phase: str) -> Callable[[int], AbstractContextManager[None]]:
    share, seed = context.settings.dropout, context.settings.seed
    return lambda number: context.adapter_dropout(share, derive_seed(seed, "dropout", phase, number))
