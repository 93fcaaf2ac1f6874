"""Hides optional packages from diffusers and transformers, which would import them all and start slowly."""

from __future__ import annotations

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
