"""Defines `Budget`: how much of a delta's spectrum is kept, and the least rank for it.

Knows only singular values: no matrix, no layer, no adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor, where, zeros_like

from lora_engine.errors import SettingsError

NOISE = 1e-6
"""Singular values below this share of the largest one are float32 rounding errors, and count as zero."""


_ALLOWED: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "rank": ("a whole number from 1", lambda x: isinstance(x, int) and x >= 1),
    "energy": ("above 0, up to 1", lambda x: 0.0 < x <= 1.0),
    "error": ("from 0, below 1", lambda x: 0.0 <= x < 1.0),
    "threshold": ("a number from 0", lambda x: 0.0 <= x < math.inf),
    "ratio": ("a number from 1", lambda x: 1.0 <= x < math.inf),
    "cumulative": ("above 0, up to 1", lambda x: 0.0 < x <= 1.0),
}


@dataclass(frozen=True)
class Budget:
    """How much of a delta is kept: the least rank that meets all criteria, and at most `rank`.

    Attributes:
        rank: The rank; with another criterion, the maximum rank.
        energy: Share of the squared Frobenius norm to keep, in (0, 1].
        error: Maximum relative Frobenius error, in [0, 1); equals an energy of `1 - error ** 2`.
        threshold: Smallest singular value to keep.
        ratio: Smallest singular value to keep, as the largest one divided by this; at least 1.
        cumulative: Share of the sum of singular values to keep, in (0, 1].
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    threshold: float | None = None
    ratio: float | None = None
    cumulative: float | None = None

    def __post_init__(self) -> None:
        for name, (allowed, is_allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise SettingsError(f"{name} is {value!r}", allowed=allowed, remedy=f"choose another {name}")
        if all(getattr(self, field.name) is None for field in fields(self)):
            raise SettingsError(
                "no criterion for the rank is set",
                allowed=", ".join(field.name for field in fields(self)),
                remedy="set a rank, an energy or an error",
            )

    @property
    def is_fixed(self) -> bool:
        """True if only `rank` is set."""
        return all(getattr(self, field.name) is None for field in fields(self) if field.name != "rank")

    def least_rank(self, values: Tensor) -> int:
        """Returns the rank to keep, at least 1.

        Args:
            values: Singular values, the largest first.
        """
        cap = min(self.rank or len(values), len(values))
        if self.is_fixed:
            return max(cap, 1)
        sizes = values.double()
        largest = float(sizes[0])
        sizes = where(sizes > NOISE * largest, sizes, zeros_like(sizes))
        needed = [1]
        if self.energy is not None:
            needed.append(_least_reaching(sizes.square(), self.energy))
        if self.error is not None:
            tails = sizes.square().flip(0).cumsum(0).flip(0)
            needed.append(int((tails > self.error**2 * tails[0] * (1 + 1e-12)).sum()))
        if self.threshold is not None:
            needed.append(int((sizes >= self.threshold).sum()))
        if self.ratio is not None:
            needed.append(int((sizes * self.ratio >= largest * (1 - 1e-12)).sum()) if largest else 1)
        if self.cumulative is not None:
            needed.append(_least_reaching(sizes, self.cumulative))
        return max(1, min(cap, max(needed)))


def _least_reaching(parts: Tensor, share: float) -> int:
    reached = parts.cumsum(0)
    return int((reached < share * reached[-1] * (1 - 1e-12)).sum()) + 1
