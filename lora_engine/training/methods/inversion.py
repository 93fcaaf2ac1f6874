"""Textual inversion (Gal et al. 2022): trains the vectors of a learned token only."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lora_engine.training.methods.context import Method, MethodContext
from lora_engine.training.specs.methods import MethodSpec, TokenSettings

if TYPE_CHECKING:
    from lora_engine.training.phases import Phase


class TextualInversion(MethodSpec, TokenSettings):
    """Textual inversion: learns a token and no weight; rank, kind, targets and rates are ignored."""

    takes_prior: ClassVar[bool] = False
    has_adapter: ClassVar[bool] = False
    name: Literal["textual-inversion"] = "textual-inversion"
    preservation: None = None

    def phase_steps(self, steps: int) -> dict[str, int]:
        """Returns the steps of the only phase."""
        return {"inversion": steps}


def inversion_phase(context: MethodContext, steps: int) -> Phase:
    """Returns the phase that trains the learned token alone."""
    from lora_engine.training.denoising import denoising_phase
    from lora_engine.training.embeddings import norm_decay
    from lora_engine.training.phases import ParameterGroup

    method = context.settings.method
    if not isinstance(method, TokenSettings) or context.tokens is None:
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


TEXTUAL_INVERSION = Method(TextualInversion, "a learned token, and no weight", _phases)
