"""Pivotal tuning (Roich et al. 2021, for diffusion by lora_pti): first the word, then the adapter and the word."""

from __future__ import annotations

from collections.abc import Callable

from lora_engine.errors import SettingsError
from lora_engine.training.embeddings import norm_decay
from lora_engine.training.methods.context import Method, MethodContext, methods
from lora_engine.training.methods.denoising import denoising_phase
from lora_engine.training.methods.inversion import inversion_phase
from lora_engine.training.phases import ParameterGroup, Phase, nothing_after
from lora_engine.training.rates import groups_for
from lora_engine.training.specs.methods import Pivotal


def _phases(context: MethodContext) -> list[Phase]:
    method, steps = context.settings.method, context.settings.steps
    if not isinstance(method, Pivotal) or context.words is None:
        raise TypeError("these are the phases of pivotal tuning alone")
    if steps < 2:
        raise SettingsError(f"steps is {steps}", allowed="2 or more: pivotal tuning has two phases")
    # Neither phase is ever empty, however few steps there are.
    first = min(max(round(steps * method.inversion), 1), steps - 1)
    groups = [*groups_for(context.parameters, context.settings.rates, context.settings.learning_rate)]
    after: Callable[[float], None] = nothing_after
    if method.tuning_rate:
        groups.append(ParameterGroup(context.words, method.tuning_rate))
        after = norm_decay(context.base, context.words, method, method.tuning_rate)
    tuning = denoising_phase(context, "tuning", steps=steps - first, groups=groups, after=after)
    return [inversion_phase(context, first), tuning]


methods.add("pivotal", Method(_phases))
