"""Starts Loraline's own processes sooner: diffusers and transformers import every optional package that they find."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = ("bitsandbytes", "peft", "sklearn")
"""Packages that diffusers and transformers import where they are installed, for features that Loraline does not use."""


def hide_optional() -> list[str]:
    """Makes the optional packages look as if they were not installed, and returns the names of those that it hid.

    For processes that are Loraline's alone: in a notebook, diffusers would lose its PEFT backend. A package that is
    imported already stays.
    """
    hidden = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importlib finds no such package
    return hidden


@contextmanager
def optional_hidden() -> Iterator[None]:
    """Hides the optional packages until the block ends; what is imported in it stays as it is."""
    hidden = hide_optional()
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules[name] is None:
                del sys.modules[name]
