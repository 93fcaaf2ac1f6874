"""(IA)3: a learned gain for each output or input channel (Liu et al. 2022, arXiv 2205.05638).

LyCORIS and PEFT define it differently, hence two kinds. LyCORIS stores the gain minus one and does not change the bias.
PEFT stores the gain, and scales the bias together with the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward
from lora_engine.adapters.rotation import check_has_rows, compute_dtype
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp


@dataclass(frozen=True, eq=False)
class Ia3Delta(Delta):
    """A gain for each channel as in LyCORIS: `W' = (1 + scale) * W`; the bias does not change.

    Attributes:
        scale: One value per channel: `[channels]`, for a convolution `[1, channels, 1, 1]`.
        axis: The channels that are scaled: `output` (rows of the weight) or `input` (columns).
    """

    kind: ClassVar[str] = "ia3"
    identity: ClassVar[float] = 0.0
    """The value of `scale` that changes nothing."""
    scales_bias: ClassVar[bool] = False
    """True if the bias is scaled together with the outputs."""
    scale: Tensor
    axis: Literal["output", "input"] = "output"

    @property
    def alpha(self) -> None:
        """None: the kind has no alpha."""
        return

    @property
    def rank(self) -> None:
        """None: the kind has no inner dimension."""
        return

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
    ) -> Self:
        """Creates a delta with gain 1.

        Raises:
            SettingsError: The layer is a norm.
        """
        check_has_rows(weight)
        return cls(torch.full(cls._shape(weight.shape, axis), cls.identity), axis)

    @classmethod
    def _shape(cls, weight_shape: Sequence[int], axis: str) -> tuple[int, ...]:
        channels = weight_shape[0 if axis == "output" else 1]
        return (channels,) if len(weight_shape) == 2 else (1, channels, *(1 for _ in weight_shape[2:]))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `scale`, on outputs; ignores alpha."""
        return cls(factors["scale"])

    def factors(self) -> dict[str, Tensor]:
        """Returns `scale`."""
        return {"scale": self.scale}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with another tensor and the same axis."""
        return replace(self, scale=factors["scale"])

    def _gain(self, dtype: torch.dtype) -> Tensor:
        return self.scale.flatten().to(dtype) - self.identity

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `(gain - 1) * base` in float32 (float64 for a float64 base)."""
        dtype = compute_dtype(base)
        ones = [1 for _ in base.shape[1:]]
        shape = (-1, *ones) if self.axis == "output" else (1, -1, *ones[1:])
        return base.to(dtype) * self._gain(dtype).reshape(shape)

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """Returns `(gain - 1) * bias` in float32 or wider; None if the bias does not change."""
        if bias is None or not self.scales_bias or self.axis == "input":
            return None
        return bias.to(compute_dtype(bias)) * self._gain(compute_dtype(bias))

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Returns `out` plus the scaled output of the layer, without a second weight."""
        if op.other is not None or op.groups > 1:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        gain = self._gain(compute_dtype(self.scale)).to(x.dtype).reshape(-1, *(1 for _ in range(op.dims)))
        weight = base_weight.to(x.dtype)
        if self.axis == "input":
            change = op(x * gain, weight)
        else:
            bias = base_bias.to(x.dtype) if self.scales_bias and base_bias is not None else None
            # Computed again: `out` may include other adapters, and dropout may have changed `x`.
            change = op(x, weight, bias) * gain
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with `scale` in the shape for this weight."""
        return replace(self, scale=self.scale.reshape(self._shape(weight_shape, self.axis)))

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields an unknown axis, channels along several dimensions, and shapes that do not fit the weight."""
        if self.axis not in ("output", "input"):
            yield Issue("axis", f"the axis is {self.axis!r}", "output or input", DAMAGED)
            return
        shape = list(self.scale.shape)
        if self.scale.numel() == 0 or self.scale.dim() == 0 or self.scale.numel() != max(shape):
            yield Issue("scale", f"the shape is {shape}", "one value per channel, all along one dimension", DAMAGED)
        elif weight_shape is not None and len(weight_shape) < 2:
            allowed = "linear layers and convolutions"
            yield Issue("scale", f"the base's weight {list(weight_shape)} is a norm's", allowed, OTHER_BASE)
        elif weight_shape is not None and self.scale.numel() != weight_shape[0 if self.axis == "output" else 1]:
            channels = weight_shape[0 if self.axis == "output" else 1]
            allowed = f"{channels} values, one for each {self.axis} of the base's weight {list(weight_shape)}"
            yield Issue("scale", f"the shape is {shape}", allowed, OTHER_BASE)


class PeftIa3Delta(Ia3Delta):
    """A gain for each channel as in PEFT: `W' = scale * W`, and on outputs `b' = scale * b`.

    `scale` is `[out, 1]` or `[1, in]`, for a convolution `[1, channels, 1, 1]`.
    """

    kind: ClassVar[str] = "peft-ia3"
    identity: ClassVar[float] = 1.0
    scales_bias: ClassVar[bool] = True

    @classmethod
    def _shape(cls, weight_shape: Sequence[int], axis: str) -> tuple[int, ...]:
        if len(weight_shape) > 2:
            return super()._shape(weight_shape, axis)
        return (weight_shape[0], 1) if axis == "output" else (1, weight_shape[1])
