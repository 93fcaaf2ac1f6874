"""Starts Loraline's own processes sooner: hides packages that diffusers imports, collects no garbage during imports."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = ("bitsandbytes", "peft", "sklearn")
"""Packages that diffusers and transformers import if installed, for features that Loraline does not use."""


def hide_optional() -> list[str]:
    """Makes the optional packages look as if they were not installed; returns the names of those that it hid.

    Only for Loraline's own processes: in a notebook, diffusers would lose its PEFT backend. A package that is already
    imported stays.
    """
    hidden = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importlib finds no such package
    return hidden


@contextmanager
def optional_hidden() -> Iterator[None]:
    """Hides the optional packages until the block ends; modules imported within it stay imported."""
    hidden = hide_optional()
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collects no garbage until the block ends, and exempts all objects of that moment from later collections.

    For imports: they make millions of objects that stay, which each collection would visit again. This takes a sixth
    off the imports of a training.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
