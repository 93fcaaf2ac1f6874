"""Textual inversion (Gal et al. 2022): the vectors of a word move, and nothing else."""

from __future__ import annotations

from lora_engine.training.embeddings import norm_decay
from lora_engine.training.methods.context import Method, MethodContext, methods
from lora_engine.training.methods.denoising import denoising_phase
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.specs.methods import Pivotal, TextualInversion


def inversion_phase(context: MethodContext, steps: int) -> Phase:
    """The phase in which the word alone moves."""
    method = context.settings.method
    if not isinstance(method, TextualInversion | Pivotal) or context.words is None:
        raise TypeError("only methods that learn a word have an inversion")
    return denoising_phase(
        context,
        "inversion",
        steps=steps,
        groups=[ParameterGroup(context.words, method.word_rate)],
        after=norm_decay(context.base, context.words, method, method.word_rate),
    )


def _phases(context: MethodContext) -> list[Phase]:
    return [inversion_phase(context, context.settings.steps)]


methods.add("textual-inversion", Method(_phases))
