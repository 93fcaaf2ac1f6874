"""The errors of a pipeline: what is wrong with its file, and what went wrong while it ran."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.errors import EngineError


class SpecError(EngineError):
    """A pipeline file that cannot be run; found before anything runs."""


class NotReproducible(EngineError):
    """A version that cannot be built again from what is known of it.

    Args:
        version: `name@version`.
        reasons: All reasons at once.
        remedy: One thing to do.
    """

    def __init__(self, version: str, reasons: Sequence[str], remedy: str = "") -> None:
        self.reasons = tuple(reasons)
        listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        super().__init__(f"it cannot be reproduced: {listed}", where=version, remedy=remedy)


class PipelineFailed(EngineError):
    """A step failed; the steps that do not depend on it were finished and are kept."""
