"""Defines the errors of pipelines: invalid files, failed steps, versions that cannot be reproduced."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.errors import EngineError


class SpecError(EngineError):
    """An invalid pipeline file or option; raised before anything runs."""


class NotReproducible(EngineError):
    """A version that cannot be rebuilt from its lineage.

    Args:
        version: `name@version`.
        reasons: All reasons at once.
        remedy: The fix, as an imperative.
    """

    def __init__(self, version: str, reasons: Sequence[str], remedy: str = "") -> None:
        self.reasons = tuple(reasons)
        listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        super().__init__(f"cannot be reproduced: {listed}", where=version, remedy=remedy)


class PipelineFailed(EngineError):
    """A failed step; the results of steps that do not depend on it are kept."""


class NotStarted(PipelineFailed):
    """A step that another failed step kept from starting."""


class StepTimeout(PipelineFailed):
    """A step that took longer than its `timeout`; it is tried again, as after a lost connection."""


class DeliveryError(EngineError):
    """A delivery target that cannot be used, or does not hold what it should; the next delivery continues."""
