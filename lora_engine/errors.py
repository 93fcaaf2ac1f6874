"""Defines the engine's exceptions and the form of their messages.

WordedError                 the root of the registry's tree, too
└── EngineError
    ├── AdapterError        an adapter file or an adapter in memory: structure, names, ranks, values
    │   └── UnknownBaseError    its base family is unknown or not supported, so its modules have no canonical names
    ├── BaseModelError      a base model: not found, unknown family, shapes that do not match
    │   └── NotDownloadedError  it is on the hub alone, and the command downloads nothing
    ├── DataError           a folder of images, a manifest, a caption file
    ├── SettingsError       a value in a spec that the engine cannot use (too large a rank, an unknown preset)
    └── TrainingError       a run that had to stop
        ├── NonFiniteError      NaN or Inf in loss, gradient or weight
        └── InterruptedRun      stopped by a signal, after the run wrote its checkpoint
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

_SHOWN = 2000
"""Characters of each part of a message; the values that it quotes may be of any length."""
_END = 200


class WordedError(Exception):
    """An error that names the problem, its location, the allowed values and the fix.

    The message escapes control characters, which would reach a terminal, and shortens very long parts.

    Args:
        problem: The problem, with the offending value as `repr`.
        where: File, line, tensor, module, artifact, version or alias.
        allowed: The allowed values.
        remedy: The fix, as an imperative.
    """

    def __init__(self, problem: str, *, where: str = "", allowed: str = "", remedy: str = "") -> None:
        self.problem, self.where, self.allowed, self.remedy = problem, where, allowed, remedy
        parts = [f"{make_readable(where)}: {make_readable(problem)}" if where else make_readable(problem)]
        if allowed:
            parts.append(f"Allowed: {make_readable(allowed)}.")
        if remedy:
            parts.append(f"Fix: {make_readable(remedy)}.")
        super().__init__(" ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles an error as it is, also of a class with other arguments, for the process that waits for it."""
        return _restore_error, (type(self), self.args, vars(self))

    @property
    def reason(self) -> str:
        """The problem with the allowed values, without place and fix, as a list of files shows it."""
        return f"{self.problem}; allowed: {self.allowed}" if self.allowed else self.problem

    def at(self, where: str) -> Self:
        """Returns the same error with another location, for callers that know it more precisely."""
        return type(self)(self.problem, where=where, allowed=self.allowed, remedy=self.remedy)


class EngineError(WordedError):
    """An input that the engine refuses, or an operation that fails."""


class AdapterError(EngineError):
    """An adapter, in a file or in memory, that is incomplete or does not match the base."""


class UnknownBaseError(AdapterError):
    """An adapter whose base family is unknown or not supported: its modules have no canonical names.

    `formats.verbatim` reads such a file under its own names.
    """


class BaseModelError(EngineError):
    """A base model, or a model that captions images, that cannot be found, read or used."""


class NotDownloadedError(BaseModelError):
    """A model of the hub that is not on this machine, in a command that downloads nothing, such as a plan."""


class DataError(EngineError):
    """Images, captions or a manifest that cannot be used."""


class SettingsError(EngineError):
    """A setting that the engine cannot use."""


class TrainingError(EngineError):
    """A training run that had to stop."""


class NonFiniteError(TrainingError):
    """NaN or Inf appeared in a loss, a gradient or a weight."""


class InterruptedRun(TrainingError):
    """A signal stopped the run; the next run resumes from its last checkpoint."""


def _restore_error(kind: type[WordedError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> WordedError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    vars(error).update(attributes)
    return error


def make_readable(text: str) -> str:
    """Returns a text as a message shows it: control and direction characters escaped, a very long middle left out."""
    text = _shortened(text)
    if text.isprintable():
        return text
    # An escaped character is up to ten times as long.
    return _shortened(
        "".join(
            character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
            for character in text
        )
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - _END]} ... {text[-_END:]}"


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, most: int = 1) -> str:
    """Returns the remedy `did you mean 'x'?` with the nearest known names; `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=most)
    return f"did you mean {', '.join(map(repr, near))}?" if near else otherwise
