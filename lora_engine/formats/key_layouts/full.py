"""Factor keys of full differences: of weights and biases, and of norms."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_engine.adapters import Delta, FullDelta
from lora_engine.formats.key_layout import LYCORIS_KEYS, TableFactorKeys

if TYPE_CHECKING:
    from torch import Tensor

_NORM = {"diff": "w_norm", "bias": "b_norm"}


@dataclass(frozen=True)
class FullKeys(TableFactorKeys):
    """`diff` and `diff_b`; for norms, whose weight is a vector, `w_norm` and `b_norm`. Both are read for any layer."""

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns None if either suffix is present, else the suffix of the weight."""
        return None if suffixes else self.names["diff"]

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix; norms get their own suffixes, which other programs look for."""
        is_norm = isinstance(delta, FullDelta) and delta.diff is not None and delta.diff.dim() == 1
        names = _NORM if is_norm else self.names
        return {names[factor]: tensor for factor, tensor in delta.factors().items()}


LYCORIS_KEYS.add(
    FullKeys(
        "full",
        {"diff": "diff", "bias": "diff_b"},
        aliases={"w_norm": "diff", "b_norm": "bias"},
        optional=("diff", "bias"),
    )
)
