"""Captioned fine-tuning: one phase on the user's images."""

from __future__ import annotations

from lora_engine.training.methods.context import Method, MethodContext, methods
from lora_engine.training.methods.denoising import denoising_phase
from lora_engine.training.phases import Phase


def _phases(context: MethodContext) -> list[Phase]:
    return [denoising_phase(context, "finetune")]


methods.add("finetune", Method(_phases))
