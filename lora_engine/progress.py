"""Defines the progress callback. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """A callback for (done, total, values); `values` are numbers to show, such as the loss."""

    def __call__(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """Receives an update; must return quickly."""
        ...


def no_progress(done: int, total: int, values: Mapping[str, float]) -> None:
    """Ignores the update."""
