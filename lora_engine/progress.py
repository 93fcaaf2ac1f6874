"""How long work tells how far it is. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: (done, total, values); `values` are numbers to show, such as the loss."""

    def __call__(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """Takes note; must return soon."""
        ...


def no_progress(done: int, total: int, values: Mapping[str, float]) -> None:
    """Takes no note."""
