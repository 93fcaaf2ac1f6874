"""Computes the leading singular values and vectors of a large matrix, and drops those that noise explains.

Knows only matrices: no layer, no file. `budget.Budget` defines how much of a delta is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.decomposition import sketched_svd, whole_svd
from lora_engine.errors import SettingsError
from lora_engine.merging.budget import Budget

_FIRST = 32


@dataclass(frozen=True)
class Noise:
    """An upper bound of independent noise in the elements of a matrix.

    Attributes:
        edge: Upper bound of the singular values of noise alone.
        energy: Sum of the variances of all elements.
    """

    edge: float
    energy: float

    @classmethod
    def of(cls, variance: Tensor) -> Noise:
        """Returns the noise of elements with these variances `[m, n]`.

        For equal variances the edge is `sigma (sqrt(m) + sqrt(n))` (Marchenko and Pastur 1967). Rows and columns of a
        weight differ in size, and so does their rounding. In general the edge is the root of the largest row sum of
        variances plus that of the largest column sum (Bandeira and van Handel 2016, theorem 1.1).
        """
        variance = variance.double()
        edge = math.sqrt(float(variance.sum(1).max())) + math.sqrt(float(variance.sum(0).max()))
        return cls(edge, float(variance.sum()))


@dataclass(frozen=True)
class LeadingPart:
    """The leading part of a matrix: `left * values @ right`.

    Attributes:
        left: `[m, k]`, orthonormal columns.
        values: `[k]`, the largest first.
        right: `[k, n]`, orthonormal rows.
        error: Relative Frobenius error of the part, 0 to 1; 0 for a matrix of zeros.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return len(self.values)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Returns `(left sqrt(values), sqrt(values) right)`: balanced factors, which suit the range of float16."""
        root = self.values.sqrt()
        return self.left * root, root[:, None] * self.right


def leading_part(
    matrix: Tensor, budget: Budget | None, *, generator: torch.Generator, noise: Noise | None = None
) -> LeadingPart:
    """Returns the leading part of a matrix.

    Args:
        matrix: `[m, n]`, float32.
        budget: How much to keep; a budget of a rank only, or None, computes only the necessary part of the spectrum.
        generator: Draws the sketch; on the CPU.
        noise: Upper bound of the noise; singular values that noise explains are dropped, possibly all.

    Raises:
        SettingsError: Neither a budget nor noise is set.
    """
    if budget is None and noise is None:
        raise SettingsError("no criterion for the rank is set", allowed="a budget, the noise, or both")
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if total == 0.0:
        empty = matrix.new_zeros(0)
        return LeadingPart(matrix.new_zeros(len(matrix), 0), empty, matrix.new_zeros(0, matrix.shape[1]), 0.0)
    is_partial = budget is None or budget.is_fixed
    requested = budget.rank if is_partial and budget is not None and budget.rank else _FIRST
    while True:
        is_complete = not is_partial or 4 * requested >= min(matrix.shape)
        if is_complete:
            left, values, right = whole_svd(matrix)
        else:
            left, values, right = sketched_svd(matrix, requested, generator=generator)
        count = len(values) if noise is None else _above_noise(matrix, left, values, right, noise)
        if budget is not None:
            count = min(count, budget.least_rank(values))
        elif count == len(values) and not is_complete:
            requested *= 2
            continue
        return _part(matrix, total, left[:, :count], values[:count], right[:count])


def _above_noise(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor, noise: Noise) -> int:
    above = int((values > noise.edge).sum())
    # The residual without the certain signal estimates the noise. `free` corrects for the noise in the removed part.
    free = (1 - above / matrix.shape[0]) * (1 - above / matrix.shape[1])
    measured = _residual_norm(matrix, left[:, :above], values[:above], right[:above]) ** 2
    share = min(1.0, measured / (noise.energy * free)) if free > 0.0 else 1.0
    return int((values > noise.edge * math.sqrt(share)).sum())


def _part(matrix: Tensor, total: float, left: Tensor, values: Tensor, right: Tensor) -> LeadingPart:
    error = math.sqrt(max(0.0, 1.0 - float(values.double().square().sum()) / total))
    if error < 0.03:  # 1 - share would cancel: measure the residual instead
        error = _residual_norm(matrix, left, values, right) / math.sqrt(total)
    return LeadingPart(left, values, right, error)


def _residual_norm(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> float:
    """Returns the Frobenius norm of a matrix minus a part of it."""
    residual = torch.addmm(matrix, left * values, right, alpha=-1.0)
    return float(torch.linalg.vector_norm(residual, dtype=torch.float64))
