"""Training methods by name: each gives the phases of a run. None has a loop of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from lora_engine.bases.base import BaseModel
from lora_engine.registries import Registry
from lora_engine.seeds import derive_seed
from lora_engine.training.batches import Batch, Mixer
from lora_engine.training.examples import Conditioner, Example
from lora_engine.training.losses import DenoisingLoss, LossTerm, PriorLoss
from lora_engine.training.phases import ParameterGroup, Phase, no_surroundings
from lora_engine.training.spec import Prior, TrainSettings


@dataclass(frozen=True)
class Workbench:
    """What a method makes its phases from.

    Attributes:
        base: With the adapter attached.
        settings: What the person set.
        parameters: The adapter's factors, by name.
        examples: The pictures to train on.
        class_examples: Class pictures; empty unless the method uses prior preservation.
        latents: The latents of an example, on the CPU.
        conditioner: The conditioning of captions.
        dropping: From the share and a seed to what makes the adapter overlook a part of its input.
    """

    base: BaseModel
    settings: TrainSettings
    parameters: Mapping[str, nn.Parameter]
    examples: tuple[Example, ...]
    class_examples: tuple[Example, ...]
    latents: Callable[[Example], Tensor]
    conditioner: Conditioner
    dropping: Callable[[float, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        phases: Makes the phases of a run.
        uses_prior: Whether class pictures are drawn for it.
    """

    phases: Callable[[Workbench], list[Phase]]
    uses_prior: bool = False


methods: Registry[Method] = Registry("training method")


def predict(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the network makes of a batch's noisy latents, and what it should."""
    noisy = base.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = base.noise.target(batch.latents, batch.noise, batch.timesteps)
    return base.predict(noisy, batch.timesteps, batch.conditioning), target


def _denoise(bench: Workbench, name: str, terms: tuple[LossTerm, ...]) -> Phase:
    settings = bench.settings
    mixer = Mixer(
        bench.base,
        bench.latents,
        bench.conditioner,
        bench.examples,
        class_examples=bench.class_examples,
        batch=settings.batch,
        seed=settings.seed,
        caption_dropout=settings.caption_dropout,
    )
    return Phase(
        name=name,
        steps=settings.steps,
        groups=(ParameterGroup(bench.parameters, settings.learning_rate),),
        batch=mixer,
        predict=lambda batch: predict(bench.base, batch),
        terms=terms,
        around=_dropout(bench, name) if settings.dropout else no_surroundings,
    )


def _dropout(bench: Workbench, phase: str) -> Callable[[int], AbstractContextManager[None]]:
    share, seed = bench.settings.dropout, bench.settings.seed
    return lambda number: bench.dropping(share, derive_seed(seed, "dropout", phase, number))


def _finetune(bench: Workbench) -> list[Phase]:
    return [_denoise(bench, "finetune", (DenoisingLoss(),))]


def _dreambooth(bench: Workbench) -> list[Phase]:
    prior = bench.settings.prior or Prior()
    return [_denoise(bench, "dreambooth", (DenoisingLoss(), PriorLoss(prior.weight)))]


methods.add("finetune", Method(_finetune))
methods.add("dreambooth", Method(_dreambooth, uses_prior=True))
