"""Rotations that several adapter kinds share: the Cayley transform, and blocks along the last dimension.

The functions return the change (rotation minus identity), which is exactly zero for a new adapter. Each kind decides
whether inputs or outputs are rotated, and in which direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_engine.errors import SettingsError
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def compute_dtype(tensor: Tensor, *others: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: the widest of the tensors', at least float32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def cayley(skew: Tensor) -> Tensor:
    """Returns `(I + S)(I - S)^-1 - I` for skew-symmetric matrices `[..., b, b]` (Cayley 1846); float32 or float64."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    change: Tensor = torch.linalg.solve(identity - skew, 2.0 * skew)
    return change


def neumann(skew: Tensor, terms: int) -> Tensor:
    """Returns PEFT's series for `cayley`: `2S + 2S^2 + ... + S^(terms-1)`, with the last term halved.

    As PEFT 0.18 and later compute it: three terms equal four.
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


def limit_norm(skew: Tensor, limit: float) -> Tensor:
    """Scales the matrices together to a common Frobenius norm of at most `limit`; 0 means no limit."""
    if limit == 0:
        return skew
    # Not torch.norm: the gradient at zero, where training starts, must be zero.
    norm = skew.square().sum().clamp_min(torch.finfo(skew.dtype).tiny).sqrt() + 1e-8
    return skew * (limit / norm).clamp(max=1.0)


def rotate_blocks(change: Tensor, values: Tensor) -> Tensor:
    """Multiplies the last dimension `n * b` of `values` blockwise by `change` `[n, b, b]`.

    A single block (n = 1) is used for every part of the dimension.
    """
    blocks = values.reshape(*values.shape[:-1], -1, change.shape[-1])
    matrices = change.to(values.dtype).expand(blocks.shape[-2], -1, -1)
    return torch.einsum("nij,...nj->...ni", matrices, blocks).flatten(-2)


def nearest_block(width: int, requested: int, fits: Callable[[int], bool], allowed: str) -> int:
    """Returns the valid block size nearest to the requested one, the smaller of two; it divides `width`.

    Raises:
        SettingsError: No valid size of at least 2 exists, or the requested size is below 1.
    """
    if requested < 1:
        raise SettingsError(f"rank {requested!r} is not a block size", allowed="1 or more", remedy="raise the rank")
    sizes = [size for size in range(2, width + 1) if width % size == 0 and fits(size)]
    if not sizes:
        raise SettingsError(
            f"{width} channels cannot be split into blocks to rotate",
            allowed=allowed,
            remedy="leave the module out of the targets, or choose another kind for it",
        )
    return min(sizes, key=lambda size: (abs(size - requested), size))


def check_has_rows(weight: Tensor) -> None:
    """Raises `SettingsError` if a weight has fewer than two dimensions.

    Raises:
        SettingsError: The weight is a vector (of a norm).
    """
    if weight.dim() < 2:
        raise SettingsError(
            f"a weight of shape {list(weight.shape)} has no inputs and outputs",
            allowed="linear layers and convolutions",
            remedy="leave the module out of the targets, or choose kind full for it",
        )
