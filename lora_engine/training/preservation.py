"""Differential output preservation: on class captions the adapted network is trained to match the base's output."""

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
from lora_engine.training.examples import Conditioner, encode_captions
from lora_engine.training.objective import noisy_and_target

if TYPE_CHECKING:
    from lora_engine.bases.base import BaseModel
    from lora_engine.training.methods.context import MethodContext


@dataclass(frozen=True, kw_only=True)
class PreservationBatch(Batch):
    """A batch with the user's noisy images repeated under class captions, after the other rows.

    Attributes:
        teacher_conditioning: Conditioning of the teacher for the repeated rows.
    """

    teacher_conditioning: Conditioning


@dataclass(frozen=True)
class OutputPreservation:
    """Adds the class-caption rows to a batch, and the teacher's output to its targets.

    Attributes:
        base: Base with the adapter attached.
        conditioner: Encodes captions with the adapter.
        teacher: Encodes captions by the base alone.
        adapter_disabled: Returns a context in which the base predicts without the adapter.
        to_class_caption: An image's caption -> a caption of the class.
    """

    base: BaseModel
    conditioner: Conditioner
    teacher: Conditioner
    adapter_disabled: Callable[[], AbstractContextManager[None]]
    to_class_caption: Callable[[str], str]

    @classmethod
    def from_context(cls, context: MethodContext) -> OutputPreservation | None:
        """Returns the preservation of the settings; None if it is disabled.

        Raises:
            SettingsError: There is no prompt, and the trigger or the class word is missing.
        """
        settings = context.settings.method.preservation
        if settings is None:
            return None
        to_class_caption = class_captions(settings.prompt, context.trigger, context.class_word)
        teacher = context.teacher or context.conditioner
        return cls(context.base, context.conditioner, teacher, context.adapter_disabled, to_class_caption)

    def add_rows(self, batch: Batch, number: int) -> PreservationBatch:
        """Returns the batch with its noisy images repeated under class captions."""
        del number
        count = batch.instances
        examples = batch.examples[:count]
        captions = [self.to_class_caption(example.caption) for example in examples]
        weights, perturbation = batch.weights, batch.perturbation
        mask_tensors = {
            name: value
            for name, value in batch.conditioning.tensors.items()
            if name in ("mask", "masked")  # inputs of an inpainting base
        }
        extra = Conditioning({name: value[:count] for name, value in mask_tensors.items()})
        conditioning = encode_captions(self.base, self.conditioner, captions, examples).with_tensors(extra)
        with torch.no_grad(), self.adapter_disabled():
            teacher_conditioning = encode_captions(self.base, self.teacher, captions, examples).with_tensors(extra)
        return PreservationBatch(
            latents=torch.cat([batch.latents, batch.latents[:count]]),
            noise=torch.cat([batch.noise, batch.noise[:count]]),
            timesteps=torch.cat([batch.timesteps, batch.timesteps[:count]]),
            conditioning=Conditioning.cat([batch.conditioning, conditioning]),
            instances=count,
            examples=(*batch.examples, *batch.examples[:count]),
            weights=None if weights is None else torch.cat([weights, torch.ones_like(weights[:count])]),
            perturbation=None if perturbation is None else torch.cat([perturbation, perturbation[:count]]),
            teacher_conditioning=teacher_conditioning,
        )

    def replace_targets(self, batch: Batch, target: Tensor) -> Tensor:
        """Returns the targets, with the teacher's predictions for the repeated rows."""
        if not isinstance(batch, PreservationBatch):
            raise TypeError("call add_rows first")
        rows = slice(batch.instances, None)
        noisy, _ = noisy_and_target(self.base.noise, batch)
        with torch.no_grad(), self.adapter_disabled():
            predictions = self.base.predict(noisy[rows], batch.timesteps[rows], batch.teacher_conditioning)
        return torch.cat([target[: batch.instances], predictions])


def class_captions(prompt: str | None, trigger: str | None, class_word: str | None) -> Callable[[str], str]:
    """Returns a function from an image's caption to one of the class.

    Args:
        prompt: The class caption of all images; None replaces the trigger by the class word.
        trigger: Token of the subject; "sks star" as a whole becomes "star".
        class_word: Class of the subject.

    Raises:
        SettingsError: There is no prompt, and the trigger or the class word is missing.
    """
    if prompt is not None:
        return lambda _: prompt
    if not trigger or not class_word:
        raise SettingsError(
            "preservation has no class caption",
            remedy="set trigger and class_word in the caption step, or set preservation.prompt",
        )
    both, alone = token_pattern(f"{trigger} {class_word}"), token_pattern(trigger)
    return lambda caption: alone.sub(lambda _: class_word, both.sub(lambda _: class_word, caption))
