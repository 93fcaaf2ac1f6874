"""torch, imported on the first use of one of its attributes.

Files are recognized by names, shapes and dtypes alone, without torch, whose import takes two seconds. Modules that read
files therefore import torch from here, and `Tensor` only for annotations. Modules that train or sample import it
directly.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import nn

__all__ = ["F", "nn", "torch"]


class _LazyModule(ModuleType):
    """A module that is imported on the first look-up of one of its attributes."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self.__name__), name)
        # The next look-up finds it here, as fast as in the module itself.
        setattr(self, name, value)
        return value


if not TYPE_CHECKING:
    torch, nn, F = map(_LazyModule, ("torch", "torch.nn", "torch.nn.functional"))
