"""Defines the callbacks of running work: progress, and what a training measures, draws and warns of. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """A callback for (done, total, values); `values` are numbers to show, such as the loss."""

    def __call__(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """Receives an update; must return quickly."""
        ...


def no_progress(done: int, total: int, values: Mapping[str, float]) -> None:
    """Ignores the update."""


@dataclass(frozen=True)
class Point:
    """The measurements of one training step.

    Attributes:
        step: Steps done; 0 is before the first.
        time: Seconds since the epoch.
        values: Measurement -> value: `loss` and its terms, `learning_rate`, `gradient_norm`, `validation_loss`,
            `images_per_second`, `peak_memory_mib`.
    """

    step: int
    time: float
    values: Mapping[str, float]


class Watcher(Protocol):
    """Receives what a training measures, draws and warns of while it runs. Every method must return quickly."""

    def on_points(self, points: Sequence[Point]) -> None:
        """Receives the measurements of all steps since the last call, in order."""
        ...

    def on_samples(self, step: int, files: Sequence[Path]) -> None:
        """Receives the image files that were drawn after so many steps."""
        ...

    def on_warning(self, text: str) -> None:
        """Receives a warning; each text once."""
        ...


class Unwatched:
    """A watcher that ignores everything."""

    def on_points(self, points: Sequence[Point]) -> None:
        """Ignores the measurements."""

    def on_samples(self, step: int, files: Sequence[Path]) -> None:
        """Ignores the files."""

    def on_warning(self, text: str) -> None:
        """Ignores the warning."""
