"""The engine's errors: one tree, and one way to word them.

WordedError                 the root of the registry's tree, too
└── EngineError
    ├── AdapterError        an adapter file or an adapter in memory: structure, names, ranks, values
    ├── BaseModelError      a base model: not found, unknown family, shapes that do not fit
    ├── DataError           a folder of pictures, a manifest, a caption file
    ├── SettingsError       a value in a spec that the engine cannot use (too large a rank, an unknown preset)
    └── TrainingError       a run that had to stop
        ├── NonFiniteError      NaN or Inf in loss, gradient or weight
        └── InterruptedRun      stopped by a signal, after its checkpoint was written
"""

from __future__ import annotations

from typing import Self


class WordedError(Exception):
    """An error worded for the person who can mend it.

    Args:
        problem: What is wrong, with the offending value as `repr`.
        where: File, line, tensor, module, artifact, version or alias.
        allowed: What would have been right.
        remedy: One thing to do.
    """

    def __init__(self, problem: str, *, where: str = "", allowed: str = "", remedy: str = "") -> None:
        self.problem, self.where, self.allowed, self.remedy = problem, where, allowed, remedy
        parts = [f"{where}: {problem}" if where else problem]
        if allowed:
            parts.append(f"Allowed: {allowed}.")
        if remedy:
            parts.append(f"To do: {remedy}.")
        super().__init__(" ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts))

    def at(self, where: str) -> Self:
        """The same error with another place, for those who know better where it is."""
        return type(self)(self.problem, where=where, allowed=self.allowed, remedy=self.remedy)


class EngineError(WordedError):
    """Anything that the engine refuses or cannot do."""


class AdapterError(EngineError):
    """An adapter, in a file or in memory, that is not whole or does not fit."""


class BaseModelError(EngineError):
    """A base model that cannot be found, read or used."""


class DataError(EngineError):
    """Images, captions or a manifest that cannot be used."""


class SettingsError(EngineError):
    """A setting that the engine cannot honour."""


class TrainingError(EngineError):
    """A training run that had to stop."""


class NonFiniteError(TrainingError):
    """NaN or Inf appeared in a loss, a gradient or a weight."""


class InterruptedRun(TrainingError):
    """A signal stopped the run; its last checkpoint is on the disk and the next run continues from it."""
