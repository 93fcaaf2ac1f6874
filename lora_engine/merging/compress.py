"""Compresses one delta to low-rank factors.

`resize` compresses whole adapters; `streaming.extract` the difference of two checkpoints.
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
    """A compressed delta.

    Attributes:
        delta: Balanced float32 factors of scale 1: `up` is U sqrt(S), `down` is sqrt(S) V^T. Both fit into float16 if
            the delta does.
        retained: Share of the squared Frobenius norm that is kept, in [0, 1]; 1 for a delta of zero.
        energy: Squared Frobenius norm of the delta before compression.
    """

    delta: LoraDelta
    retained: float
    energy: float


def compress_to(delta: LoraDelta | Tensor, budget: Budget, generator: torch.Generator | None = None) -> Compressed:
    """Returns the best approximation of a delta (Eckart and Young 1936) at the least rank that a budget allows.

    Args:
        delta: Factors, compressed without the dense delta; or a dense delta `[out, in]` or `[out, in, k, k]`.
        budget: The rank, or what to keep.
        generator: For the sketch of a large dense delta; None means a generator with seed 0.

    Raises:
        AdapterError: The delta is not finite, or a vector.
    """
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
    """Returns `down` `[r, in * k * k]` and `up` `[out, r]` in float32 or wider, with a Tucker core multiplied in."""
    dtype = torch.promote_types(torch.promote_types(delta.down.dtype, delta.up.dtype), torch.float32)
    down, up = delta.down.detach().flatten(1).to(dtype), delta.up.detach().flatten(1).to(dtype)
    if delta.mid is not None:
        down = torch.einsum("mn...,nr->mr...", delta.mid.detach().to(dtype), down).flatten(1)
    return down, up


def _compress_factors(delta: LoraDelta, budget: Budget) -> Compressed:
    down, up = plain_factors(delta)
    # QR of both factors leaves a core of size rank x rank, which has the delta's singular values.
    left, core_left = torch.linalg.qr(up)
    right, core_right = torch.linalg.qr(down.T)
    core = (core_left.double() @ core_right.double().T) * delta.scale
    if not bool(torch.isfinite(core).all()):
        raise AdapterError("the delta is not finite", remedy="check the file that it was read from")
    first, values, second = torch.linalg.svd(core)
    rank = budget.least_rank(values)
    roots = values[:rank].sqrt()
    up = left @ (first[:, :rank] * roots).to(left.dtype)
    down = (roots[:, None] * second[:rank]).to(right.dtype) @ right.T
    total = float(values.square().sum())
    kept = float(values[:rank].square().sum())
    return Compressed(_lora(down, up, delta.weight_shape, delta.bias), _share(kept, total), total)


def _compress_dense(delta: Tensor, budget: Budget, generator: torch.Generator | None) -> Compressed:
    matrix = delta.detach().flatten(1).to(torch.promote_types(delta.dtype, torch.float32))
    total = float(matrix.double().square().sum())
    if not math.isfinite(total):
        raise AdapterError("the delta is not finite", remedy="check the files that it was computed from")
    if total == 0.0:
        down, up = matrix.new_zeros(1, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 1)
        return Compressed(_lora(down, up, tuple(delta.shape)), 1.0, 0.0)
    rank = budget.rank or 0
    if budget.is_fixed and min(matrix.shape) >= max(_SKETCHED_FROM, 4 * (rank + OVERSAMPLING)):
        draw = generator if generator is not None else torch.Generator().manual_seed(0)
        left, values, right = sketched_svd(matrix, rank, generator=draw, oversampling=OVERSAMPLING)
    else:
        left, values, right = whole_svd(matrix)
    rank = budget.least_rank(values)
    roots = values[:rank].sqrt()
    down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
    retained = _share(float(values[:rank].double().square().sum()), total)
    if retained > _NEARLY_ALL:  # 1 - retained would cancel: measure the residual instead
        residual = torch.addmm(matrix, up, down, alpha=-1.0)
        retained = 1.0 - float(residual.double().square().sum()) / total
    return Compressed(_lora(down, up, tuple(delta.shape)), retained, total)


def _share(kept: float, total: float) -> float:
    return min(1.0, kept / total) if total else 1.0


def _lora(down: Tensor, up: Tensor, shape: tuple[int, ...], bias: Tensor | None = None) -> LoraDelta:
    rank = down.shape[0]
    ones = [1 for _ in shape[2:]]
    down = down.float().reshape(rank, *shape[1:]).contiguous()
    return LoraDelta(down, up.float().reshape(shape[0], rank, *ones).contiguous(), float(rank), bias=bias)
