"""DoRA: a weight's direction moved by another kind's delta, and a magnitude for each of its rows or columns.

`W' = magnitude * (W + D) / ||W + D||` (arXiv 2402.09353, equation 5). The paper's norm is per column of a matrix that
stands the other way round, which is a row here, an output; LyCORIS before 3.2 and OneTrainer take the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward, kinds
from lora_engine.adapters.layer import LayerOp
from lora_engine.adapters.loha import LohaDelta
from lora_engine.adapters.lokr import LokrDelta
from lora_engine.adapters.lora import LoraDelta
from lora_engine.errors import SettingsError

Inner = LoraDelta | LohaDelta | LokrDelta
INNER: Mapping[str, type[Inner]] = {"lora": LoraDelta, "loha": LohaDelta, "lokr": LokrDelta}
"""The kinds that can move the direction."""
MAGNITUDE = "magnitude"
_TELLING: Mapping[str, type[Inner]] = {"down": LoraDelta, "down1": LohaDelta}
"""Names of factors that tell of which kind they are; all others are LoKr's."""


@dataclass(frozen=True, eq=False)
class DoraDelta(Delta):
    """What brings a weight to `magnitude * (W + D) / ||W + D||`.

    Attributes:
        inner: D, a LoRA, LoHa or LoKr, which moves the direction.
        magnitude: `[out, 1]` for the norms of the rows (outputs) or `[1, in]` for those of the columns (inputs), with
            as many further dimensions of 1 as the weight has; the shape tells which.
    """

    kind: ClassVar[str] = "dora"
    inner: Inner
    magnitude: Tensor

    @property
    def alpha(self) -> float:
        """The inner delta's."""
        return self.inner.alpha

    @property
    def rank(self) -> int | None:
        """The inner delta's."""
        return self.inner.rank

    @property
    def axis(self) -> int:
        """The dimension of the weight that has a magnitude for each entry: 0 for outputs, 1 for inputs."""
        lines, columns = self.magnitude.shape[:2]
        return 0 if columns == 1 and (lines > 1 or self._sides[0] == 1) else 1

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        axis: Literal["output", "input"] = "output",
        inner: Literal["lora", "loha", "lokr"] = "lora",
    ) -> Self:
        """A fresh delta: a fresh inner one, and the norms of the weight as it is."""
        if axis not in ("output", "input") or inner not in INNER:
            problem = f"axis {axis!r} with an inner kind {inner!r}"
            allowed = f"output or input, with {', '.join(INNER)}"
            raise SettingsError(problem, allowed=allowed, remedy="choose one of these")
        made = INNER[inner].create(weight, bias, rank, alpha, generator)
        place = 0 if axis == "output" else 1
        norms = _squares(weight.detach().float().cpu(), place).sqrt()
        shape = [1 for _ in weight.shape]
        shape[place] = -1
        return cls(made, norms.reshape(shape))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The delta of `magnitude` and an inner kind's factors; a magnitude of one dimension is that of the outputs."""
        rest = {name: factor for name, factor in factors.items() if name != MAGNITUDE}
        kind: type[Inner] = next((kind for name, kind in _TELLING.items() if name in rest), LokrDelta)
        magnitude = factors[MAGNITUDE]
        fused_forward = magnitude.unsqueeze(1) if magnitude.dim() == 1 else magnitude
        return cls(kind.from_factors(rest, alpha), fused_forward)

    def factors(self) -> dict[str, Tensor]:
        """The inner delta's, and `magnitude`."""
        return {**self.inner.factors(), MAGNITUDE: self.magnitude}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """The same settings with other tensors."""
        rest = {name: factor for name, factor in factors.items() if name != MAGNITUDE}
        return type(self)(self.inner.with_factors(rest), factors[MAGNITUDE])

    def with_inner(self, inner: Inner) -> Self:
        """The same magnitude around another delta."""
        return type(self)(inner, self.magnitude)

    def delta_weight(self, base: Tensor) -> Tensor:
        """`W' - W` in float32 (float64 for a float64 base); no gradient goes through the norm (section 4.3)."""
        change = self.inner.delta_weight(base)
        gain = self._gain(base, change)
        return (gain - 1) * base.to(change.dtype) + gain * change

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """The inner delta's."""
        return self.inner.delta_bias(bias)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """The output by way of the inner delta's own forward and one more pass through the base's weight.

        That pass cannot be spared: `out` may hold other adapters' work, and stems from all of the input.
        """
        if op.groups > 1 or op.other is not None or self.delta_bias(base_bias) is not None:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        gain = self._gain(base_weight).reshape(-1, *(1 for _ in range(op.dims)))
        nothing = out.new_zeros(())  # the sum with it is the difference alone
        more = (gain - 1).to(x.dtype)
        if self.axis == 0:
            plain = op(x, base_weight)
            turned = self.inner.forward(x, nothing, base_weight, None, op)
            change = more * plain + gain.to(turned.dtype) * turned
        else:
            turned = self.inner.forward(gain.to(x.dtype) * x, nothing, base_weight, None, op)
            change = op(more * x, base_weight) + turned
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def _gain(self, base: Tensor, change: Tensor | None = None) -> Tensor:
        """`magnitude / ||W + D||`, in the shape of the magnitude; `change` is D, where it is at hand."""
        with torch.no_grad():
            weight = base.to(torch.promote_types(base.dtype, torch.float32))
            squares = self._squares(weight) if change is None else _squares(weight + change, self.axis)
            # Rows of zeros have no direction; as in LyCORIS they must not give NaN.
            norms = squares.clamp_min(0).sqrt().clamp_min(torch.finfo(torch.float32).eps)
            norms = norms.reshape(self.magnitude.shape)
        return self.magnitude.to(norms.dtype) / norms

    def _squares(self, weight: Tensor) -> Tensor:
        """Sums of squares of the lines of W + D; with a LoRA without the product of its factors.

        `||w + s u D||^2 = ||w||^2 + 2 s (w D^T) u + s^2 u (D D^T) u` for a row w and its row u of `up`. This is as
        exact as the sum of squares unless D undoes most of W, which a rank far below the number of columns cannot.
        """
        inner, axis = self.inner, self.axis
        lines = _lines(weight, axis)
        is_matrix = axis == 0 or weight.dim() == 2
        if not (isinstance(inner, LoraDelta) and inner.mid is None and is_matrix and 2 * inner.rank < min(lines.shape)):
            return _squares(weight + inner.delta_weight(weight), axis)
        up, down = inner.up.flatten(1).to(weight.dtype), inner.down.flatten(1).to(weight.dtype)
        if axis == 1:
            up, down = down.T, up.T
        crossed = ((lines @ down.T) * up).sum(1)
        own = ((up @ (down @ down.T)) * up).sum(1)
        return lines.square().sum(1) + 2 * inner.scale * crossed + inner.scale**2 * own

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """The same delta with a magnitude in the number of dimensions that this weight has."""
        ones = [1 for _ in weight_shape[2:]]
        magnitude = self.magnitude.reshape(*self.magnitude.shape[:2], *ones)
        return type(self)(self.inner.reshaped_for(weight_shape), magnitude)

    @property
    def _sides(self) -> tuple[int, int]:
        inner = self.inner
        return (inner.up.shape[0], inner.down[0].numel()) if isinstance(inner, LoraDelta) else inner.sides

    def faults(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """The inner delta's, and a magnitude that is neither a row nor a column or has another length."""
        inner = list(self.inner.faults(weight_shape))
        yield from inner
        if inner:
            return
        shape = list(self.magnitude.shape)
        if len(shape) not in (2, 4) or 0 in shape or self.magnitude.numel() != max(shape[:2]):
            allowed = "[out, 1] or [1, in], for a convolution [out, 1, 1, 1] or [1, in, 1, 1]"
            yield Issue(MAGNITUDE, f"the shape is {shape}", allowed, DAMAGED)
            return
        rows, columns = self._sides
        count = self.magnitude.numel()
        if weight_shape is not None and count != weight_shape[self.axis]:
            allowed = f"{weight_shape[self.axis]} values for the base's weight {list(weight_shape)}"
            yield Issue(MAGNITUDE, f"the shape is {shape}", allowed, OTHER_BASE)
        elif (count != rows) if self.axis == 0 else bool(columns % count):
            allowed = f"[{rows}, 1] or a row of one value for each input, beside the other factors"
            yield Issue(MAGNITUDE, f"the shape is {shape}", allowed, DAMAGED)


def _squares(weight: Tensor, axis: int) -> Tensor:
    return _lines(weight, axis).square().sum(1)


def _lines(weight: Tensor, axis: int) -> Tensor:
    """The rows of a weight as a matrix `[out, in * k * k]`, or its columns `[in, out * k * k]`."""
    return weight.flatten(1) if axis == 0 else weight.transpose(0, 1).flatten(1)


kinds.add(DoraDelta.kind, DoraDelta)
