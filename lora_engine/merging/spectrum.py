"""The leading singular values and vectors of a large matrix at little cost, and which of them are no noise.

Knows matrices alone: no layer, no file. How much of a delta is to be kept is said by `budget.Budget`.
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
    """How large independent noise in the elements of a matrix may be.

    Attributes:
        edge: The singular value that noise alone does not reach.
        energy: The sum of the variances of all elements.
    """

    edge: float
    energy: float

    @classmethod
    def of(cls, variance: Tensor) -> Noise:
        """The noise of elements of these variances `[m, n]`.

        For equal variances the edge is `sigma (sqrt(m) + sqrt(n))` (Marchenko and Pastur 1967). Rows and columns of a
        weight are not of one size, and neither is their rounding; in general it is the root of the largest sum of
        variances in a row, and that in a column (Bandeira and van Handel 2016, theorem 1.1).
        """
        wide = variance.double()
        edge = math.sqrt(float(wide.sum(1).max())) + math.sqrt(float(wide.sum(0).max()))
        return cls(edge, float(wide.sum()))


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
        """How many singular values it has."""
        return len(self.values)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """`(left sqrt(values), sqrt(values) right)`: both of one size, which float16 bears best."""
        root = self.values.sqrt()
        return self.left * root, root[:, None] * self.right


def leading_part(
    matrix: Tensor, budget: Budget | None, *, generator: torch.Generator, noise: Noise | None = None
) -> LeadingPart:
    """The leading part of a matrix, of the rank that is asked for.

    Args:
        matrix: `[m, n]`, float32.
        budget: How much to keep; with a rank alone, or with None, only as much of the spectrum is computed as tells it.
        generator: Where the sketch comes from; on the CPU.
        noise: The most noise that there may be; singular values that noise alone explains are dropped, perhaps all.

    Raises:
        SettingsError: Neither a budget nor noise.
    """
    if budget is None and noise is None:
        raise SettingsError("nothing says how much to keep", allowed="a budget, the noise, or both")
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if total == 0.0:
        empty = matrix.new_zeros(0)
        return LeadingPart(matrix.new_zeros(len(matrix), 0), empty, matrix.new_zeros(0, matrix.shape[1]), 0.0)
    is_partial = budget is None or budget.is_fixed
    wanted = budget.rank if is_partial and budget is not None and budget.rank else _FIRST
    while True:
        is_whole = not is_partial or 4 * wanted >= min(matrix.shape)
        left, values, right = whole_svd(matrix) if is_whole else sketched_svd(matrix, wanted, generator=generator)
        count = len(values) if noise is None else _above_noise(matrix, left, values, right, noise)
        if budget is not None:
            count = min(count, budget.least_rank(values))
        elif count == len(values) and not is_whole:
            wanted *= 2
            continue
        return _part(matrix, total, left[:, :count], values[:count], right[:count])


def _above_noise(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor, noise: Noise) -> int:
    above = int((values > noise.edge).sum())
    # What is left when all that surely is no noise has gone tells how much noise there is; the parts that have gone
    # took their share of it with them.
    free = (1 - above / matrix.shape[0]) * (1 - above / matrix.shape[1])
    measured = _rest(matrix, left[:, :above], values[:above], right[:above]) ** 2
    share = min(1.0, measured / (noise.energy * free)) if free > 0.0 else 1.0
    return int((values > noise.edge * math.sqrt(share)).sum())


def _part(matrix: Tensor, total: float, left: Tensor, values: Tensor, right: Tensor) -> LeadingPart:
    error = math.sqrt(max(0.0, 1.0 - float(values.double().square().sum()) / total))
    if error < 0.03:  # a difference of nearly equal numbers by then, so the rest itself is measured
        error = _rest(matrix, left, values, right) / math.sqrt(total)
    return LeadingPart(left, values, right, error)


def _rest(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> float:
    """Frobenius norm of what a part leaves of a matrix."""
    rest = torch.addmm(matrix, left * values, right, alpha=-1.0)
    return float(torch.linalg.vector_norm(rest, dtype=torch.float64))
