"""The errors of a pipeline: what is wrong with its file, and what went wrong while it ran."""

from __future__ import annotations

from lora_engine.errors import EngineError


class SpecError(EngineError):
    """A pipeline file that cannot be run; found before anything runs."""


class PipelineFailed(EngineError):
    """A step failed; the steps that do not depend on it were finished and are kept."""
