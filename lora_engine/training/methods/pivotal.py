"""Pivotal tuning (Roich et al. 2021, for diffusion by lora_pti): trains a token, then the adapter and the token."""

from __future__ import annotations

from collections.abc import Callable

from lora_engine.errors import SettingsError
from lora_engine.training.embeddings import norm_decay
from lora_engine.training.methods.context import Method, MethodContext, methods
from lora_engine.training.methods.denoising import denoising_phase
from lora_engine.training.methods.inversion import inversion_phase
from lora_engine.training.phases import ParameterGroup, Phase, no_hook
from lora_engine.training.rates import groups_for
from lora_engine.training.specs.methods import Pivotal


def _phases(context: MethodContext) -> list[Phase]:
    method, steps = context.settings.method, context.settings.steps
    if not isinstance(method, Pivotal) or context.tokens is None:
        raise TypeError("the settings have another method than pivotal")
    if steps < 2:
        raise SettingsError(f"steps is {steps}", allowed="2 or more, since pivotal tuning has two phases")
    # Each phase has at least one step.
    first = min(max(round(steps * method.inversion), 1), steps - 1)
    groups = [*groups_for(context.parameters, context.settings.rates, context.settings.learning_rate)]
    after_step: Callable[[float], None] = no_hook
    if method.tuning_rate:
        groups.append(ParameterGroup(context.tokens, method.tuning_rate))
        after_step = norm_decay(context.base, context.tokens, method, method.tuning_rate)
    tuning = denoising_phase(context, "tuning", steps=steps - first, groups=groups, after_step=after_step)
    return [inversion_phase(context, first), tuning]


methods.add("pivotal", Method(_phases))
