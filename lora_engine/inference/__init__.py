"""Generates images with a base model, with or without attached adapters."""

from typing import Literal

ComposedEngine = Literal["auto", "merged", "attached"]
"""How adapters act on a base: `merged` computes weights whenever a multiplier changes, `attached` adds to outputs."""
ImageFormat = Literal["png", "webp", "jpeg"]
"""Format of a written image."""
