"""What a method works with: its entry in the registry, the workbench that its phases are made from, and `predict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from lora_engine.bases.base import BaseModel
from lora_engine.registries import Registry
from lora_engine.training.batches import Batch
from lora_engine.training.examples import Conditioner, Example
from lora_engine.training.losses import LossTerm
from lora_engine.training.objective import noisy_and_target
from lora_engine.training.phases import Phase
from lora_engine.training.spec import TrainSettings

BatchTransform = Callable[[Batch, int], Batch]
"""What a batch gets beside what was drawn for it: (batch, its number) -> batch; a pure function."""


@dataclass(frozen=True)
class MethodContext:
    """What a method makes its phases from.

    Attributes:
        base: With the adapter attached.
        settings: What the person set.
        parameters: The adapter's factors, by name; empty for a method without adapter.
        examples: The pictures to train on.
        class_examples: Class pictures; empty unless the method uses prior preservation.
        latents: The latents of an example, on the CPU.
        conditioner: The conditioning of captions.
        dropping: From the share and a seed to what makes the adapter overlook a part of its input.
        words: The learned vectors, by name; empty unless the method learns a word.
        teaching: Opens what silences the adapter, so that the base alone answers.
        teacher: The conditioning of captions by the base alone.
        trigger: The word that stands for the subject in the captions.
        class_word: What the subject is an instance of.
        extra: Terms that the settings ask for beside the method's own.
    """

    base: BaseModel
    settings: TrainSettings
    parameters: Mapping[str, nn.Parameter]
    examples: tuple[Example, ...]
    class_examples: tuple[Example, ...]
    latents: Callable[[Example], Tensor]
    conditioner: Conditioner
    adapter_dropout: Callable[[float, int], AbstractContextManager[None]]
    words: Mapping[str, nn.Parameter] | None = None
    adapter_disabled: Callable[[], AbstractContextManager[None]] = nullcontext
    teacher: Conditioner | None = None
    trigger: str | None = None
    class_word: str | None = None
    extra: tuple[LossTerm, ...] = ()


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        phases: Makes the phases of a run.
    """

    phases: Callable[[MethodContext], list[Phase]]


methods: Registry[Method] = Registry("training method")


def predict(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the network makes of a batch's noisy latents, and what it should."""
    noisy, target = noisy_and_target(base.noise, batch)
    return base.predict(noisy, batch.timesteps, batch.conditioning), target
