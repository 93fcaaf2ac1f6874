"""Imports on first use: torch, and the names that packages export.

Files are recognized by names, shapes and dtypes alone, without torch, whose import takes two seconds. Modules that read
files therefore import torch from here, and `Tensor` only for annotations. Modules that train or sample import it
directly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import nn

__all__ = ["F", "exports", "nn", "torch"]


class _LazyModule(ModuleType):
    """A module that is imported on the first look-up of one of its attributes."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self.__name__), name)
        # The next look-up finds it here, as fast as in the module itself.
        setattr(self, name, value)
        return value


if not TYPE_CHECKING:
    torch, nn, F = map(_LazyModule, ("torch", "torch.nn", "torch.nn.functional"))


def exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` for a package whose names are imported on their first use.

    Args:
        package: Its name.
        modules: Module to the names that the package exports from it, separated by spaces.
    """
    origins = {name: module for module, names in modules.items() for name in names.split()}

    def get_attribute(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(origins[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get_attribute, lambda: sorted({*vars(sys.modules[package]), *origins})
