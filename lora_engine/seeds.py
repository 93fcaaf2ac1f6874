"""Derives every random number of a run from the seed and a purpose.

No global generator is used, and no generator is carried from step to step: step k of a resumed run draws the same
numbers as step k of an uninterrupted run.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 63-bit seed for one purpose, such as `derive_seed(7, "noise", 120)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Returns a new generator on the CPU for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
