"""Low-rank compression of one delta: which singular values are kept, and the factors that hold them.

Whole adapters are resized in `resize`; what the difference of two checkpoints is made into, in `extract`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.adapters import LoraDelta
from lora_engine.decomposition import sketched_svd, whole_svd
from lora_engine.errors import AdapterError
from lora_engine.merging.budget import Budget

OVERSAMPLING = 32
_SKETCHED_FROM = 512
_NEARLY_ALL = 0.999


@dataclass(frozen=True)
class Compressed:
    """What became of a delta.

    Attributes:
        delta: Balanced float32 factors of scale 1: `up` is U sqrt(S), `down` is sqrt(S) V^T, so that both stay within
            the range of float16 wherever the delta does.
        retained: Share of the squared Frobenius norm that is kept, in [0, 1]; 1 for a delta of zero.
        energy: The squared Frobenius norm before.
    """

    delta: LoraDelta
    retained: float
    energy: float


def compress(
    delta: LoraDelta | Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Compressed:
    """The best approximation of a delta (Eckart and Young 1936) at a rank, or at the least rank that keeps enough.

    Args:
        delta: Factors, from which the dense delta is never formed; or a dense delta `[out, in]` or `[out, in, k, k]`.
        rank: See `Budget`, as for `energy`, `error` and `threshold`.
        energy: Share of the squared norm to keep.
        error: Largest relative error.
        threshold: Smallest singular value to keep.
        generator: For the sketch of a large dense delta; None draws from a generator of seed 0.

    Raises:
        SettingsError: Nothing, or something impossible, is asked for.
        AdapterError: The delta is not finite, or a vector.
    """
    return compress_to(delta, Budget(rank, energy, error, threshold), generator)


def compress_to(delta: LoraDelta | Tensor, budget: Budget, generator: torch.Generator | None = None) -> Compressed:
    """As `compress`, for a budget."""
    if isinstance(delta, LoraDelta):
        return _compress_factors(delta, budget)
    if delta.dim() < 2:
        raise AdapterError(
            f"a difference of shape {list(delta.shape)} is a vector, which has no rank",
            allowed="weights of two or four dimensions",
            remedy="store it as kind full",
        )
    return _compress_dense(delta, budget, generator)


def plain_factors(delta: LoraDelta) -> tuple[Tensor, Tensor]:
    """`down` `[r, in * k * k]` and `up` `[out, r]` of a delta in float32 (or float64), a Tucker core multiplied in."""
    dtype = torch.promote_types(torch.promote_types(delta.down.dtype, delta.up.dtype), torch.float32)
    down, up = delta.down.detach().flatten(1).to(dtype), delta.up.detach().flatten(1).to(dtype)
    if delta.mid is not None:
        down = torch.einsum("mn...,nr->mr...", delta.mid.detach().to(dtype), down).flatten(1)
    return down, up


def shape_of(delta: LoraDelta) -> tuple[int, ...]:
    """Shape of the weight that a delta is for, as far as its factors tell (a 1 x 1 kernel may be missing)."""
    if delta.mid is not None:
        return (delta.up.shape[0], delta.down.shape[1], *delta.mid.shape[2:])
    return (delta.up.shape[0], *delta.down.shape[1:])


def _compress_factors(delta: LoraDelta, budget: Budget) -> Compressed:
    down, up = plain_factors(delta)
    # Orthonormal bases of both sides leave a core of the size of the rank, whose singular values are the delta's.
    left, core_left = torch.linalg.qr(up)
    right, core_right = torch.linalg.qr(down.T)
    core = (core_left.double() @ core_right.double().T) * delta.scale
    if not bool(torch.isfinite(core).all()):
        raise AdapterError("the delta is not finite", remedy="check the file that it came from")
    first, values, second = torch.linalg.svd(core)
    rank = budget.least_rank(values)
    roots = values[:rank].sqrt()
    up = left @ (first[:, :rank] * roots).to(left.dtype)
    down = (roots[:, None] * second[:rank]).to(right.dtype) @ right.T
    total = float(values.square().sum())
    kept = float(values[:rank].square().sum())
    return Compressed(_lora(down, up, shape_of(delta), delta.bias), _share(kept, total), total)


def _compress_dense(delta: Tensor, budget: Budget, generator: torch.Generator | None) -> Compressed:
    matrix = delta.detach().flatten(1).to(torch.promote_types(delta.dtype, torch.float32))
    total = float(matrix.double().square().sum())
    if not math.isfinite(total):
        raise AdapterError("the delta is not finite", remedy="check the files that it came from")
    if total == 0.0:
        down, up = matrix.new_zeros(1, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 1)
        return Compressed(_lora(down, up, tuple(delta.shape)), 1.0, 0.0)
    wanted = budget.rank or 0
    if budget.is_fixed and min(matrix.shape) >= max(_SKETCHED_FROM, 4 * (wanted + OVERSAMPLING)):
        draw = generator if generator is not None else torch.Generator().manual_seed(0)
        left, values, right = sketched_svd(matrix, wanted, generator=draw, oversampling=OVERSAMPLING)
    else:
        left, values, right = whole_svd(matrix)
    rank = budget.least_rank(values)
    roots = values[:rank].sqrt()
    down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
    retained = _share(float(values[:rank].double().square().sum()), total)
    if retained > _NEARLY_ALL:  # a difference of nearly equal numbers by then, so the rest is measured
        rest = torch.addmm(matrix, up, down, alpha=-1.0)
        retained = 1.0 - float(rest.double().square().sum()) / total
    return Compressed(_lora(down, up, tuple(delta.shape)), retained, total)


def _share(kept: float, total: float) -> float:
    return min(1.0, kept / total) if total else 1.0


def _lora(down: Tensor, up: Tensor, shape: tuple[int, ...], bias: Tensor | None = None) -> LoraDelta:
    rank = down.shape[0]
    ones = [1 for _ in shape[2:]]
    down = down.float().reshape(rank, *shape[1:]).contiguous()
    return LoraDelta(down, up.float().reshape(shape[0], rank, *ones).contiguous(), float(rank), bias=bias)
