"""OFT of the parts of a fused layer, as in kohya's sd-scripts for FLUX: each part has blocks of its own size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import OTHER_BASE, Delta, Issue
from lora_engine.adapters.oft import OftDelta
from lora_engine.adapters.rotation import check_has_rows, nearest_block
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS = "blocks_"


@dataclass(frozen=True, eq=False)
class OftPartsDelta(Delta):
    """`OftDelta` for consecutive rows of a weight.

    Attributes:
        blocks: For each part `[n, b, b]`; `n * b` is its number of rows.
        alpha: Constraint of each part, as in `OftDelta`.
    """

    kind: ClassVar[str] = "oft-parts"
    blocks: tuple[Tensor, ...]
    alpha: float = 0.0

    @property
    def rank(self) -> None:
        """None: the kind has no inner dimension."""
        return

    @property
    def parts(self) -> list[OftDelta]:
        """The deltas of the parts, in the order of the rows."""
        return [OftDelta(blocks, self.alpha) for blocks in self.blocks]

    @property
    def rows(self) -> list[int]:
        """The number of rows of each part."""
        return [part.outputs for part in self.parts]

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
    ) -> Self:
        """Creates a delta of two parts, each half of the rows, without rotation; arguments as `OftDelta.create`."""
        check_has_rows(weight)
        allowed = "a number of outputs whose halves have a divisor of at least 2"
        blocks = []
        for half in weight.chunk(2):
            size = nearest_block(half.shape[0], rank, lambda size: True, allowed)
            blocks.append(torch.zeros(half.shape[0] // size, size, size))
        return cls(tuple(blocks), float(alpha or 0.0))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `blocks_0`, `blocks_1`, ...; `alpha` None means no constraint."""
        return cls(tuple(factors[f"{_BLOCKS}{number}"] for number in range(len(factors))), alpha or 0.0)

    def factors(self) -> dict[str, Tensor]:
        """Returns the blocks of the parts as `blocks_0`, `blocks_1`, ..."""
        return {f"{_BLOCKS}{number}": blocks for number, blocks in enumerate(self.blocks)}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same constraint."""
        return replace(self, blocks=type(self).from_factors(factors, self.alpha).blocks)

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `W' - W` in float32 (float64 for a float64 base)."""
        weights = torch.split(base, self.rows)
        return torch.cat([part.delta_weight(rows) for part, rows in zip(self.parts, weights, strict=True)])

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields the issues of the parts, and a sum of their rows that is not that of the weight."""
        for number, part in enumerate(self.parts):
            for issue in part.issues():
                is_alpha = issue.factor == "alpha"
                yield issue if is_alpha else replace(issue, factor=f"{_BLOCKS}{number}")
                return
        if weight_shape is not None and (len(weight_shape) < 2 or sum(self.rows) != weight_shape[0]):
            problem = f"the parts rotate {' + '.join(map(str, self.rows))} outputs"
            yield Issue(f"{_BLOCKS}0", problem, f"the outputs of the base's weight {list(weight_shape)}", OTHER_BASE)
