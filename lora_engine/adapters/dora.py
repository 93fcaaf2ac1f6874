"""DoRA: another kind's delta changes the direction of a weight; each row or column has a trained magnitude.

`W' = magnitude * (W + D) / ||W + D||` (arXiv 2402.09353, equation 5). The paper takes the norm of each column of the
transposed weight, which is a row (an output) here. LyCORIS before 3.2 and OneTrainer take the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward
from lora_engine.adapters.loha import LohaDelta
from lora_engine.adapters.lokr import LokrDelta
from lora_engine.adapters.lokr_rows import LokrRowsDelta
from lora_engine.adapters.lora import LoraDelta
from lora_engine.errors import SettingsError
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp

Inner = LoraDelta | LohaDelta | LokrDelta | LokrRowsDelta
INNER: Mapping[str, type[Inner]] = {"lora": LoraDelta, "loha": LohaDelta, "lokr": LokrDelta}
"""The kinds that can change the direction; beside them, rows of a LoKr in files of fused layers."""
MAGNITUDE = "magnitude"
_KIND_OF_FACTOR: Mapping[str, type[Inner]] = {"down": LoraDelta, "down1": LohaDelta}
"""Factor names that identify the inner kind; without one of them it is LoKr."""


@dataclass(frozen=True, eq=False)
class DoraDelta(Delta):
    """The difference between `magnitude * (W + D) / ||W + D||` and `W`.

    Attributes:
        inner: D, a LoRA, LoHa or LoKr delta (or rows of a LoKr), which changes the direction.
        magnitude: `[out, 1]` with the norms of the rows (outputs), or `[1, in]` with those of the columns (inputs).
            Further dimensions of 1 match those of the weight.
    """

    kind: ClassVar[str] = "dora"
    inner: Inner
    magnitude: Tensor

    @property
    def alpha(self) -> float:
        """Alpha of the inner delta."""
        return self.inner.alpha

    @property
    def rank(self) -> int | None:
        """Rank of the inner delta."""
        return self.inner.rank

    @property
    def axis(self) -> int:
        """The dimension of the weight that the magnitudes index: 0 for outputs, 1 for inputs."""
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
        inner: str = "lora",
    ) -> Self:
        """Creates a delta: a new inner delta, and the norms of the current weight."""
        if axis not in ("output", "input") or inner not in INNER:
            problem = f"axis {axis!r} with inner kind {inner!r}"
            allowed = f"output or input, with {', '.join(INNER)}"
            raise SettingsError(problem, allowed=allowed, remedy="choose one of these")
        direction = INNER[inner].create(weight, bias, rank, alpha, generator)
        dimension = 0 if axis == "output" else 1
        norms = _squares(weight.detach().float().cpu(), dimension).sqrt()
        shape = [1 for _ in weight.shape]
        shape[dimension] = -1
        return cls(direction, norms.reshape(shape))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `magnitude` and inner factors; a magnitude of one dimension is that of the outputs."""
        rest = {name: factor for name, factor in factors.items() if name != MAGNITUDE}
        kind: type[Inner] = next((kind for name, kind in _KIND_OF_FACTOR.items() if name in rest), LokrDelta)
        magnitude = factors[MAGNITUDE]
        magnitude = magnitude.unsqueeze(1) if magnitude.dim() == 1 else magnitude
        return cls(kind.from_factors(rest, alpha), magnitude)

    def factors(self) -> dict[str, Tensor]:
        """Returns the inner delta's factors and `magnitude`."""
        return {**self.inner.factors(), MAGNITUDE: self.magnitude}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same settings."""
        rest = {name: factor for name, factor in factors.items() if name != MAGNITUDE}
        return type(self)(self.inner.with_factors(rest), factors[MAGNITUDE])

    def with_inner(self, inner: Inner) -> Self:
        """Returns a delta with another inner delta and the same magnitude."""
        return type(self)(inner, self.magnitude)

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `W' - W` in float32 (float64 for a float64 base); the norm has no gradient (section 4.3)."""
        change = self.inner.delta_weight(base)
        gain = self._gain(base, change)
        return (gain - 1) * base.to(change.dtype) + gain * change

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """Returns the bias difference of the inner delta."""
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
        """Returns the output, computed with the inner delta's forward and a second pass through the base's weight.

        `out` cannot replace that pass: it may include other adapters, and its input had no dropout.
        """
        if op.groups > 1 or op.other is not None or self.delta_bias(base_bias) is not None:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        gain = self._gain(base_weight).reshape(-1, *(1 for _ in range(op.dims)))
        zero = out.new_zeros(())  # as `out`, it leaves the difference alone
        excess = (gain - 1).to(x.dtype)
        if self.axis == 0:
            plain = op(x, base_weight)
            inner_out = self.inner.forward(x, zero, base_weight, None, op)
            change = excess * plain + gain.to(inner_out.dtype) * inner_out
        else:
            inner_out = self.inner.forward(gain.to(x.dtype) * x, zero, base_weight, None, op)
            change = op(excess * x, base_weight) + inner_out
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def _gain(self, base: Tensor, change: Tensor | None = None) -> Tensor:
        """Returns `magnitude / ||W + D||`, in the shape of the magnitude. `change` is D, if already computed."""
        with torch.no_grad():
            weight = base.to(torch.promote_types(base.dtype, torch.float32))
            squares = self._squares(weight) if change is None else _squares(weight + change, self.axis)
            # A row of zeros has no direction; as in LyCORIS, the result must not be NaN.
            norms = squares.clamp_min(0).sqrt().clamp_min(torch.finfo(torch.float32).eps)
            norms = norms.reshape(self.magnitude.shape)
        return self.magnitude.to(norms.dtype) / norms

    def _squares(self, weight: Tensor) -> Tensor:
        """Returns the squared norms of the rows or columns of W + D, for a LoRA without the product of its factors.

        `||w + s u D||^2 = ||w||^2 + 2 s (w D^T) u + s^2 u (D D^T) u` for a row w and its row u of `up`. This is as
        exact as the sum of squares unless D cancels most of W, which a rank far below the number of columns cannot.
        """
        inner, axis = self.inner, self.axis
        lines = _lines(weight, axis)
        is_matrix = axis == 0 or weight.dim() == 2
        if not (isinstance(inner, LoraDelta) and inner.mid is None and is_matrix and 2 * inner.rank < min(lines.shape)):
            return _squares(weight + inner.delta_weight(weight), axis)
        up, down = inner.up.flatten(1).to(weight.dtype), inner.down.flatten(1).to(weight.dtype)
        if axis == 1:
            up, down = down.T, up.T
        cross_term = ((lines @ down.T) * up).sum(1)
        delta_term = ((up @ (down @ down.T)) * up).sum(1)
        return lines.square().sum(1) + 2 * inner.scale * cross_term + inner.scale**2 * delta_term

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with factors and magnitude in the number of dimensions of this weight."""
        ones = [1 for _ in weight_shape[2:]]
        magnitude = self.magnitude.reshape(*self.magnitude.shape[:2], *ones)
        return type(self)(self.inner.reshaped_for(weight_shape), magnitude)

    @property
    def _sides(self) -> tuple[int, int]:
        inner = self.inner
        return (inner.up.shape[0], inner.down[0].numel()) if isinstance(inner, LoraDelta) else inner.sides

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields the inner delta's issues, and a magnitude that is no row or column or has the wrong length."""
        inner_issues = list(self.inner.issues(weight_shape))
        yield from inner_issues
        if inner_issues:
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
            allowed = f"[{rows}, 1] or a row of one value for each input, to match the other factors"
            yield Issue(MAGNITUDE, f"the shape is {shape}", allowed, DAMAGED)


def _squares(weight: Tensor, axis: int) -> Tensor:
    return _lines(weight, axis).square().sum(1)


def _lines(weight: Tensor, axis: int) -> Tensor:
    """Returns a weight as `[out, in * k * k]` (axis 0) or `[in, out * k * k]` (axis 1)."""
    return weight.flatten(1) if axis == 0 else weight.transpose(0, 1).flatten(1)
