"""What holds while a loop runs, and is put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def gradients_off(modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Gives all parameters of the modules, without gradients; at the end each requires again what it did before."""
    everything = [value for module in modules for value in module.parameters()]
    before = [value.requires_grad for value in everything]
    for value in everything:
        value.requires_grad_(False)
    try:
        yield everything
    finally:
        for value, required in zip(everything, before, strict=True):
            value.requires_grad_(required)
            value.grad = None


@contextlib.contextmanager
def deterministic(*, wanted: bool) -> Iterator[None]:
    """Deterministic operations alone, if that is wanted; those that have no such form raise `RuntimeError`.

    On a CPU every operation has one.
    """
    if not wanted:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
