"""The training method `example-mirror`. Must not import torch, except in functions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_engine.training.methods import Method, MethodContext
from lora_engine.training.specs.methods import MethodSpec

if TYPE_CHECKING:
    from lora_engine.training.batches import Batch
    from lora_engine.training.phases import Phase


class Mirror(MethodSpec):
    """Fine-tuning in which every second batch is mirrored. Masks would have to be mirrored too, so it takes none."""

    takes_prior: ClassVar[bool] = False
    name: Literal["example-mirror"] = "example-mirror"
    mask: None = None


def mirror(batch: Batch, number: int) -> Batch:
    """Returns the batch, mirrored left to right if its number is odd."""
    return replace(batch, latents=batch.latents.flip(-1)) if number % 2 else batch


def phases(context: MethodContext) -> list[Phase]:
    """Returns the only phase."""
    from lora_engine.training.denoising import denoising_phase

    return [denoising_phase(context, "example-mirror", transforms=[mirror])]


METHOD = Method(spec=Mirror, title="fine-tuning, every second batch mirrored", phases=phases)
