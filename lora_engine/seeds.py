"""Every random number of a run, as a pure function of the seed and of what it is for.

Nothing draws from a global generator, and no generator is carried from one step to the next: step k of a resumed run
draws what step k of a run that went through draws.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits for one purpose, such as `derive_seed(7, "noise", 120)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A fresh generator on the CPU for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
