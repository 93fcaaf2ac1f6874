"""Textual inversion (Gal et al. 2022): trains the vectors of a learned token only."""

from __future__ import annotations

from lora_engine.training.embeddings import norm_decay
from lora_engine.training.methods.context import Method, MethodContext, methods
from lora_engine.training.methods.denoising import denoising_phase
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.specs.methods import Pivotal, TextualInversion


def inversion_phase(context: MethodContext, steps: int) -> Phase:
    """Returns the phase that trains the learned token alone."""
    method = context.settings.method
    if not isinstance(method, TextualInversion | Pivotal) or context.tokens is None:
        raise TypeError("only methods that learn a token have an inversion phase")
    return denoising_phase(
        context,
        "inversion",
        steps=steps,
        groups=[ParameterGroup(context.tokens, method.word_rate)],
        after_step=norm_decay(context.base, context.tokens, method, method.word_rate),
    )


def _phases(context: MethodContext) -> list[Phase]:
    return [inversion_phase(context, context.settings.steps)]


methods.add("textual-inversion", Method(_phases))
