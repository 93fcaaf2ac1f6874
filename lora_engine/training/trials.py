"""Chooses the values of automatic settings: by one backward pass of the base, and by short trainings.

A finished short training is kept in the state of the run, so an interrupted run does not repeat it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_engine.adapters.adapted import innermost
from lora_engine.adapters.layer import meta_weight
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import as_tree, module_shapes
from lora_engine.documents import read_json_object
from lora_engine.errors import NonFiniteError, SettingsError, TrainingError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from lora_engine.training.automatic import (
    PROBE_SHARE,
    PROBE_SHARE_OF_LIMIT,
    RATE_FACTORS,
    choose_blocks,
    choose_rate,
    probe_of,
)
from lora_engine.training.choosing import best_row
from lora_engine.training.denoising import predict
from lora_engine.training.job import TrainingJob
from lora_engine.training.loop import fit
from lora_engine.training.prepared import Prepared
from lora_engine.training.resolve import fit_options
from lora_engine.training.spec import TrainSettings
from lora_engine.training.validation import validation_batch

_MAX_IMAGES = 16
_RATE_SCALES = {"lion": 0.2, "came": 0.1}
_log = logging.getLogger(__name__)


def choose_targets(prepared: Prepared, settings: TrainSettings) -> tuple[list[str] | str, dict[str, Any]]:
    """Returns the layers of the blocks that change the loss, and the table of all blocks.

    One backward pass over up to 16 training images gives the norm of each layer's gradient; its product with the norm
    of the weight is summed over a block.

    Raises:
        SettingsError: The weights of the base are quantized.
    """
    base = prepared.base
    tree, names = as_tree(base), select_modules(module_shapes(base), "all")
    weights: dict[str, nn.Parameter] = {}
    for name in names:
        layer = innermost(tree.get_module(name))
        if meta_weight(layer) is not layer.weight:
            raise SettingsError(
                "targets auto needs the gradients of the weights, which a quantized base does not have",
                where="targets",
                remedy="set running.quantise to none, or choose a preset",
            )
        weights[name] = layer.weight  # type: ignore[assignment]
    totals = dict.fromkeys(names, 0.0)
    examples = sorted(prepared.images.examples, key=lambda example: example.digest)[:_MAX_IMAGES]
    with _gradient_norms(weights, totals):
        for example in examples:
            clean = prepared.encoder.latents(example)
            batch = validation_batch(base, clean, example, prepared.encoder.conditioning, settings.seed)
            predicted, target = predict(base, batch)
            torch.autograd.backward(F.mse_loss(predicted.float(), target.float()))
    products = {name: totals[name] / len(examples) * weights[name].detach().float().norm().item() for name in names}
    return choose_blocks(products)


@contextmanager
def _gradient_norms(weights: Mapping[str, nn.Parameter], totals: dict[str, float]) -> Iterator[None]:
    """Adds the norm of each gradient to `totals`, and frees it at once: never more than one layer's is in memory."""

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            if weight.grad is not None:
                totals[name] += weight.grad.float().norm().item()
                weight.grad = None

        return hook

    before = {name: weight.requires_grad for name, weight in weights.items()}
    hooks = []
    for name, weight in weights.items():
        register: Callable[..., RemovableHandle] = weight.requires_grad_(True).register_post_accumulate_grad_hook
        hooks.append(register(add(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in weights.items():
            weight.requires_grad_(before[name])


def choose_learning_rate(job: TrainingJob, prepared: Prepared, default: float) -> tuple[float, dict[str, Any]]:
    """Returns the rate below the best of five short trainings, and their losses.

    Args:
        job: The training.
        prepared: What it starts from.
        default: The usual rate of AdamW on the base.

    Raises:
        InterruptedRun: A stop was requested; finished trainings are kept.
        SettingsError: Every rate diverged, or the optimizer has no usual rates.
    """
    settings, name = job.settings, job.settings.rates.optimiser.name
    if name == "sgd":
        raise SettingsError("learning_rate auto has no usual rates of sgd", where="learning_rate", remedy="set a rate")
    usual = default * _RATE_SCALES.get(name, 1.0)
    share = PROBE_SHARE_OF_LIMIT if "steps" in job.automatic else PROBE_SHARE
    losses, steps = dict[float, list[float] | None](), 0
    for number, factor in enumerate(RATE_FACTORS, start=1):
        rate = float(f"{factor * usual:.3g}")
        probe = replace(job, settings=probe_of(settings, rate, share))
        losses[rate] = _probe(probe, prepared, f"probe {number} of {len(RATE_FACTORS)}", number)
        steps += probe.settings.steps
    try:
        chosen, evidence = choose_rate(losses)
    except ValueError as error:
        raise SettingsError(
            str(error), where="learning_rate", remedy="set a rate, or look for a broken image"
        ) from error
    return chosen, {**evidence, "steps": steps}


def _probe(job: TrainingJob, prepared: Prepared, title: str, number: int) -> list[float] | None:
    """Returns the loss of each unit after a short training; None if it diverged."""
    digest = job.digest(prepared)
    trial = sha256_bytes(canonical_json([digest, job.settings.steps, job.settings.warmup]))
    folder = job.state.folder / "trials" / trial[:16]
    losses = _read_losses(folder / "result.json")
    if losses != []:
        return losses
    with job.attached(prepared) as attached:
        try:
            fit(
                attached.phases,
                prepared.base.modules.values(),
                fit_options(job.settings, prepared.images),
                checkpoints=job.checkpoints_in(folder / "checkpoints", digest),
                progress=lambda done, total, values: job.report_probe(number, done, total),
                stop=lambda: job.group.any(job.stop()),
                average=job.group.average,
            )
            losses = list(best_row(job.scores(prepared, attached)))
        except NonFiniteError as error:
            _log.warning("%s with learning rate %g diverged: %s", title, job.settings.learning_rate, error.problem)
            losses = None
    if job.group.is_main_process:
        atomic_write(folder / "result.json", canonical_json({"losses": losses}))
    return losses


def _read_losses(file: Path) -> list[float] | None:
    """Returns the losses of a finished trial, None of one that diverged; an empty list without a readable file."""
    try:
        losses = read_json_object(file, TrainingError)["losses"]
        return None if losses is None else [float(loss) for loss in losses]
    except (OSError, TrainingError, LookupError, TypeError, ValueError):
        return []
