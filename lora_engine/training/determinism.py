"""Context managers that disable gradients and enforce deterministic operations, and restore the previous state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def gradients_off(modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Yields all parameters of the modules with gradients disabled; restores `requires_grad` on exit."""
    parameters = [value for module in modules for value in module.parameters()]
    before = [value.requires_grad for value in parameters]
    for value in parameters:
        value.requires_grad_(False)
    try:
        yield parameters
    finally:
        for value, required in zip(parameters, before, strict=True):
            value.requires_grad_(required)
            value.grad = None


@contextlib.contextmanager
def deterministic(*, enabled: bool) -> Iterator[None]:
    """Enforces deterministic operations if enabled; operations without such a form raise `RuntimeError`.

    On a CPU every operation has one.
    """
    if not enabled:
        yield
        return
    was_enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
