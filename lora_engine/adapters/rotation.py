"""Rotations that several adapter kinds share: Cayley's form, blocks along the last dimension, butterflies.

Everything here gives the change (rotation minus identity), which is exactly zero for a fresh adapter. What is rotated,
inputs or outputs, and in which direction, is each kind's own affair.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_engine.errors import SettingsError


def wide(tensor: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype to reckon in: that of the tensors, but at least float32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def cayley(skew: Tensor) -> Tensor:
    """`(I + S)(I - S)^-1 - I` for each skew-symmetric matrix of `[..., b, b]` (Cayley 1846); float32 or float64."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    change: Tensor = torch.linalg.solve(identity - skew, 2.0 * skew)
    return change


def neumann(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series for `cayley`: `2S + 2S^2 + ... + S^(terms-1)`, whose last term is halved.

    As PEFT 0.18 and later reckon it: three terms are the same as four.
    """
    if terms < 2:
        return torch.zeros_like(skew)
    if terms == 2:
        return 2.0 * skew
    power = skew @ skew
    change = 2.0 * (skew + power)
    for _ in range(3, terms - 1):
        power = power @ skew
        change = change + 2.0 * power
    return change + power @ skew


def limited(skew: Tensor, limit: float) -> Tensor:
    """The matrices, shrunk together so that their common Frobenius norm is at most `limit`; 0 is no limit."""
    if limit == 0:
        return skew
    # Not torch.norm: its gradient at zero, where training begins, must be zero.
    norm = skew.square().sum().clamp_min(torch.finfo(skew.dtype).tiny).sqrt() + 1e-8
    return skew * (limit / norm).clamp(max=1.0)


def turn(change: Tensor, values: Tensor) -> Tensor:
    """What block-wise multiplication by `change` `[n, b, b]` gives along the last dimension `n * b` of `values`.

    One block alone (n = 1) serves every part of the dimension.
    """
    blocks = values.reshape(*values.shape[:-1], -1, change.shape[-1])
    matrices = change.to(values.dtype).expand(blocks.shape[-2], -1, -1)
    return torch.einsum("nij,...nj->...ni", matrices, blocks).flatten(-2)


def nearest_block(width: int, wanted: int, fits: Callable[[int], bool], allowed: str) -> int:
    """The block size nearest to the wanted one (the smaller of two) of those that divide a width and fit.

    Raises:
        SettingsError: There is none of at least 2, or the wanted one is below 1.
    """
    if wanted < 1:
        raise SettingsError(f"rank {wanted!r} is no block size", allowed="1 or more", remedy="raise the rank")
    sizes = [size for size in range(2, width + 1) if width % size == 0 and fits(size)]
    if not sizes:
        raise SettingsError(
            f"{width} channels cannot be cut into blocks to rotate",
            allowed=allowed,
            remedy="leave the module out of the targets, or choose another kind for it",
        )
    return min(sizes, key=lambda size: (abs(size - wanted), size))


def check_has_rows(weight: Tensor) -> None:
    """Does nothing for a weight of at least two dimensions.

    Raises:
        SettingsError: It is a vector (of a norm).
    """
    if weight.dim() < 2:
        raise SettingsError(
            f"a weight of shape {list(weight.shape)} has no inputs and outputs",
            allowed="linear layers and convolutions",
            remedy="leave the module out of the targets, or choose kind full for it",
        )
