"""Textual inversion (Gal et al. 2022): the vectors of a word move, and nothing else."""

from __future__ import annotations

from lora_engine.training.embeddings import norm_decay
from lora_engine.training.methods.bench import Method, Workbench, methods
from lora_engine.training.methods.denoising import denoising_phase
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.specs.methods import Pivotal, TextualInversion


def inversion_phase(bench: Workbench, steps: int) -> Phase:
    """The phase in which the word alone moves."""
    method = bench.settings.method
    if not isinstance(method, TextualInversion | Pivotal) or bench.words is None:
        raise TypeError("only methods that learn a word have an inversion")
    return denoising_phase(
        bench,
        "inversion",
        steps=steps,
        groups=[ParameterGroup(bench.words, method.word_rate)],
        after=norm_decay(bench.base, bench.words, method, method.word_rate),
    )


def _phases(bench: Workbench) -> list[Phase]:
    return [inversion_phase(bench, bench.settings.steps)]


methods.add("textual-inversion", Method(_phases))
