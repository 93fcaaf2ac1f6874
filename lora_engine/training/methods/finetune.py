"""Captioned fine-tuning: one phase on the user's images."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lora_engine.training.methods.context import Method, MethodContext
from lora_engine.training.specs.methods import MethodSpec

if TYPE_CHECKING:
    from lora_engine.training.phases import Phase


class Finetune(MethodSpec):
    """Captioned fine-tuning: images and captions only."""

    takes_prior: ClassVar[bool] = False
    name: Literal["finetune"] = "finetune"


def _phases(context: MethodContext) -> list[Phase]:
    from lora_engine.training.denoising import denoising_phase

    return [denoising_phase(context, "finetune")]


FINETUNE = Method(Finetune, "captioned fine-tuning", _phases)
