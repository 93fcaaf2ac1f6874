"""Pivotal tuning (Roich et al. 2021, for diffusion by lora_pti): trains a token, then the adapter and the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, FiniteFloat

from lora_engine.errors import SettingsError
from lora_engine.training.methods.context import Method, MethodContext
from lora_engine.training.methods.inversion import inversion_phase
from lora_engine.training.specs.methods import MethodSpec, TokenSettings

if TYPE_CHECKING:
    from lora_engine.training.phases import Phase


class Pivotal(MethodSpec, TokenSettings):
    """Pivotal tuning (Roich et al. 2021; lora_pti): learns a token first, then the adapter and the token together.

    Attributes:
        inversion: Share of the steps that train the token alone.
        tuning_rate: Highest rate of the vectors while the adapter is trained; 0 freezes them.
    """

    name: Literal["pivotal"] = "pivotal"
    inversion: FiniteFloat = Field(default=0.5, gt=0.0, lt=1.0)
    tuning_rate: FiniteFloat = Field(default=5e-4, ge=0.0)

    def phase_steps(self, steps: int) -> dict[str, int]:
        """Returns the steps of each phase; each has at least one of two steps or more."""
        first = min(max(round(steps * self.inversion), 1), steps - 1)
        return {"inversion": first, "tuning": steps - first}


def _phases(context: MethodContext) -> list[Phase]:
    from lora_engine.training.denoising import denoising_phase
    from lora_engine.training.embeddings import norm_decay
    from lora_engine.training.phases import ParameterGroup, no_hook
    from lora_engine.training.rates import groups_for

    method, steps = context.settings.method, context.settings.steps
    if not isinstance(method, Pivotal) or context.tokens is None:
        raise TypeError("the settings have another method than pivotal")
    if steps < 2:
        raise SettingsError(f"steps is {steps}", allowed="2 or more, since pivotal tuning has two phases")
    first, rest = method.phase_steps(steps).values()
    groups = [*groups_for(context.parameters, context.settings.rates, context.settings.learning_rate)]
    after_step: Callable[[float], None] = no_hook
    if method.tuning_rate:
        groups.append(ParameterGroup(context.tokens, method.tuning_rate))
        after_step = norm_decay(context.base, context.tokens, method, method.tuning_rate)
    tuning = denoising_phase(context, "tuning", steps=rest, groups=groups, after_step=after_step)
    return [inversion_phase(context, first), tuning]


PIVOTAL = Method(Pivotal, "a learned token first, then the adapter and the token", _phases)
