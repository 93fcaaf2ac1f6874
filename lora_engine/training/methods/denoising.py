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
from lora_engine.training.methods.bench import Dressing, Workbench, predict
from lora_engine.training.objective import measure_for
from lora_engine.training.phases import ParameterGroup, Phase, no_surroundings, nothing_after
from lora_engine.training.preservation import Taught
from lora_engine.training.rates import groups_for


def denoising_phase(
    bench: Workbench,
    name: str,
    *,
    steps: int | None = None,
    groups: Sequence[ParameterGroup] | None = None,
    dressings: Sequence[Dressing] = (),
    after: Callable[[float], None] = nothing_after,
) -> Phase:
    """A phase that lowers the denoising loss, with all that the settings put beside it.

    Args:
        bench: What it is made from.
        name: Of the phase; its dropout is drawn by it.
        steps: Optimiser steps; None for all of the settings'.
        groups: What moves; None for the adapter's factors at the settings' rate.
        dressings: What the method itself puts on a batch.
        after: See `Phase`.
    """
    settings = bench.settings
    taught = Taught.of(bench)
    clothes = [*dressings]
    if settings.method.mask is not None:
        clothes.append(masked_by(settings.method.mask))
    if taught is not None:
        # Last: the rows that it adds count whole, whatever the pictures' own do.
        clothes.append(taught.add_rows)
    drawn = _batches(bench)

    def batch(number: int) -> Batch:
        found = drawn(number)
        for dress in clothes:
            found = dress(found, number)
        return found

    def look(found: Batch) -> tuple[Tensor, Tensor]:
        predicted, target = predict(bench.base, found)
        return predicted, target if taught is None else taught.replace_targets(found, target)

    return Phase(
        name=name,
        steps=settings.steps if steps is None else steps,
        groups=groups_for(bench.parameters, settings.rates, settings.learning_rate)
        if groups is None
        else tuple(groups),
        batch=batch,
        predict=look,
        terms=_terms(bench),
        around=_dropout(bench, name) if settings.dropout and bench.parameters else no_surroundings,
        after=after,
    )


def _terms(bench: Workbench) -> tuple[LossTerm, ...]:
    settings = bench.settings
    prior, preservation = settings.class_pictures, settings.method.preservation
    measure = measure_for(settings.objective, bench.base.noise)
    found: tuple[LossTerm, ...] = (DenoisingLoss(measure),)
    if prior is not None:
        found += (PriorLoss(prior.weight, measure),)
    if preservation is not None:
        found += (PriorLoss(preservation.weight, measure, "preservation"),)
    return (*found, *bench.extra)


def _batches(bench: Workbench) -> Callable[[int], Batch]:
    prior, seed = bench.settings.class_pictures, bench.settings.seed
    if prior is None or prior.batches == "joint":
        return _mixer(bench, bench.examples, bench.class_examples, seed)
    # Every second batch is of class pictures alone, in an order and a noise of their own.
    persons = _mixer(bench, bench.examples, (), seed)
    classes = _mixer(bench, bench.class_examples, (), derive_seed(seed, "class batches"))

    def alternate(number: int) -> Batch:
        place, is_class = divmod(number, 2)
        return replace(classes(place), instances=0) if is_class else persons(place)

    return alternate


def _mixer(bench: Workbench, examples: Sequence[Example], class_examples: Sequence[Example], seed: int) -> Mixer:
    return Mixer(
        bench.base,
        bench.latents,
        bench.conditioner,
        examples,
        class_examples=class_examples,
        batch=bench.settings.batch,
        seed=seed,
        caption_dropout=bench.settings.caption_dropout,
        # Class pictures, where they stand alone, keep their captions and looks.
        captions=bench.settings.captions if examples is bench.examples else None,
        objective=bench.settings.objective,
    )


def _dropout(bench: Workbench, phase: str) -> Callable[[int], AbstractContextManager[None]]:
    share, seed = bench.settings.dropout, bench.settings.seed
    return lambda number: bench.dropping(share, derive_seed(seed, "dropout", phase, number))
