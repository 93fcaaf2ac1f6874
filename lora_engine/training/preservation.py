"""Differential output preservation: on captions of the class the network is held to what the base says without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import SettingsError
from lora_engine.inference.textual_inversion import token_pattern
from lora_engine.training.batches import Batch
from lora_engine.training.examples import Conditioner
from lora_engine.training.objective import noisy_and_target

if TYPE_CHECKING:
    from lora_engine.bases.base import BaseModel
    from lora_engine.training.methods.context import MethodContext


@dataclass(frozen=True, kw_only=True)
class PreservationBatch(Batch):
    """A batch whose rows after the person's pictures are the same noisy pictures under captions of the class.

    Attributes:
        lesson: What the teacher is conditioned on for those rows.
    """

    lesson: Conditioning


@dataclass(frozen=True)
class Preserver:
    """Puts the class's rows on a batch, and the teacher's answers into its targets.

    Attributes:
        base: With the adapter attached.
        conditioner: Of captions, with the adapter.
        teacher: Of captions, by the base alone.
        teaching: Opens what silences the adapter.
        rename: From a picture's caption to one of the class.
    """

    base: BaseModel
    conditioner: Conditioner
    teacher: Conditioner
    adapter_disabled: Callable[[], AbstractContextManager[None]]
    rename: Callable[[str], str]

    @classmethod
    def of(cls, context: MethodContext) -> Preserver | None:
        """What the settings ask for; None where they do not.

        Raises:
            SettingsError: There is neither a prompt nor a class word, or no word to put it in the place of.
        """
        wanted = context.settings.method.preservation
        if wanted is None:
            return None
        rename = class_captions(wanted.prompt, context.trigger, context.class_word)
        return cls(
            context.base, context.conditioner, context.teacher or context.conditioner, context.adapter_disabled, rename
        )

    def add_rows(self, batch: Batch, number: int) -> PreservationBatch:
        """The batch with its noisy pictures once more, under captions of the class."""
        del number
        count = batch.instances
        captions = [self.rename(example.caption) for example in batch.examples[:count]]
        size = batch.examples[0].size
        device = batch.latents.device
        weights, disturbed = batch.weights, batch.perturbation
        told = {
            name: value
            for name, value in batch.conditioning.tensors.items()
            if name in ("mask", "masked")  # what an inpainting base is told beside the text
        }
        extra = Conditioning({name: value[:count] for name, value in told.items()})
        asked = self.conditioner(captions, size).to(device).with_tensors(extra)
        with torch.no_grad(), self.adapter_disabled():
            lesson = self.teacher(captions, size).to(device).with_tensors(extra)
        return PreservationBatch(
            latents=torch.cat([batch.latents, batch.latents[:count]]),
            noise=torch.cat([batch.noise, batch.noise[:count]]),
            timesteps=torch.cat([batch.timesteps, batch.timesteps[:count]]),
            conditioning=Conditioning.cat([batch.conditioning, asked]),
            instances=count,
            examples=(*batch.examples, *batch.examples[:count]),
            weights=None if weights is None else torch.cat([weights, torch.ones_like(weights[:count])]),
            perturbation=None if disturbed is None else torch.cat([disturbed, disturbed[:count]]),
            lesson=lesson,
        )

    def replace_targets(self, batch: Batch, target: Tensor) -> Tensor:
        """The targets, with the teacher's answers for the rows of the class."""
        if not isinstance(batch, PreservationBatch):
            raise TypeError("add_rows has to come first")
        rows = slice(batch.instances, None)
        noisy, _ = noisy_and_target(self.base.noise, batch)
        with torch.no_grad(), self.adapter_disabled():
            answers = self.base.predict(noisy[rows], batch.timesteps[rows], batch.lesson)
        return torch.cat([target[: batch.instances], answers])


def class_captions(prompt: str | None, trigger: str | None, class_word: str | None) -> Callable[[str], str]:
    """From a picture's caption to one of the class.

    Args:
        prompt: What all become; None puts the class word in the trigger's place.
        trigger: The word that stands for the subject; "sks star" as a whole becomes "star".
        class_word: What the subject is an instance of.

    Raises:
        SettingsError: There is no prompt, and a word is missing.
    """
    if prompt is not None:
        return lambda _: prompt
    if not trigger or not class_word:
        raise SettingsError(
            "preservation does not know what a caption of the class is",
            remedy="give trigger and class_word in the caption step, or give preservation a prompt",
        )
    both, alone = token_pattern(f"{trigger} {class_word}"), token_pattern(trigger)
    return lambda caption: alone.sub(lambda _: class_word, both.sub(lambda _: class_word, caption))
