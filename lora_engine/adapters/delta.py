"""The `Delta` protocol: what an adapter does to one layer. One small file a kind implements it and registers itself.

`delta_weight` is the meaning; `forward` is an optimisation that a law test holds to it. Names that occur only in
files (`lora_down`, `lora_A`) do not belong here: factors have their mathematical names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from lora_engine.adapters.layer import LayerOp
from lora_engine.adapters.low_rank import LowRankLinear
from lora_engine.registries import Registry


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong with a delta.

    Attributes:
        factor: The factor it concerns, or `alpha`.
        problem: What is wrong, with the value.
        allowed: What would be right.
        remedy: One thing to do.
    """

    factor: str
    problem: str
    allowed: str
    remedy: str


DAMAGED = "save or download the adapter again; the file is damaged or was edited"
OTHER_BASE = "name the base that the adapter was made for"
"""What a person can do about most faults."""


class Delta(Protocol):
    """What one adapter does to one layer: factors, and how they make a difference of weights.

    Implementations are frozen dataclasses. `alpha` is None where a kind has none.
    """

    kind: ClassVar[str]
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Names of the factors that training does not move."""
    reads_base: ClassVar[bool] = True
    """Whether the difference depends on the values of the base's weight, and not on its shape and dtype alone."""

    if TYPE_CHECKING:  # at run time a property here would be taken for the default of a dataclass's field

        @property
        def alpha(self) -> float | None:
            """The file-level alpha; the scale that follows from it is the kind's own rule."""
            ...

        @property
        def rank(self) -> int | None:
            """The inner dimension, or None for kinds without one."""
            ...

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *args: Any,
        **options: Any,
    ) -> Delta:
        """A fresh delta for a layer: float32 on the CPU, and zero in effect.

        Args:
            weight: The base's; kinds that start from its values read them, the others its shape alone.
            bias: The base's, where it has one.
            rank: Inner dimension; kinds without one pass over it.
            alpha: None stands for the kind's default.
            generator: Where random factors come from.
            *args: None.
            **options: The kind's own; see `lora_engine.training.specs.kinds`.

        Raises:
            SettingsError: The settings do not suit the layer.
        """
        ...

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The delta of these factors; `alpha` None stands for the kind's default. Nothing is checked: see `faults`."""
        ...

    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        ...

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """The same delta (kind, alpha, settings) with other tensors, for instance parameters."""
        ...

    def delta_weight(self, base: Tensor) -> Tensor:
        """What is added to the weight at multiplier 1: at least float32, in the shape of `base`."""
        ...

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """What is added to the bias at multiplier 1, or None for nothing."""
        return None

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """The adapted output, from the input and the base layer's output.

        Law: equals `op(x, base_weight + multiplier * delta_weight(base_weight), bias + multiplier * delta_bias(bias))`.
        In the dtype of `out`; factors are cast to the dtype of `x`. `x` serves the difference alone, so that dropout
        may thin it out. This default forms the dense delta.
        """
        return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)

    def fused_forward(self, weight: Tensor, bias: Tensor | None, op: LayerOp) -> LowRankLinear | None:
        """The frozen layer and this delta in one step, where the kind has one; None means `forward` alone.

        Law: where it is there, it gives what `forward` gives after the layer, and the same gradients.
        """
        return None

    def faults(self, weight_shape: Sequence[int] | None = None) -> Iterable[Issue]:
        """What is structurally wrong: shapes among the factors, alpha, and the fit to a weight where one is given."""
        ...

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """The same delta with its factors in the number of dimensions that this weight has (1x1 conv or linear)."""
        return self

    def to_export(self) -> Delta:
        """The same delta as it goes into files: kinds that exist for training alone become the kind that they train."""
        return self


kinds: Registry[type[Delta]] = Registry("adapter kind")


def dense_forward(
    delta: Delta,
    x: Tensor,
    out: Tensor,
    base_weight: Tensor,
    base_bias: Tensor | None,
    op: LayerOp,
    *,
    multiplier: float = 1.0,
) -> Tensor:
    """The adapted output by way of the dense delta; right for every kind."""
    dtype = x.dtype if x.is_floating_point() else out.dtype
    bias = delta.delta_bias(base_bias)
    change = op(x, delta.delta_weight(base_weight).to(dtype), None if bias is None else bias.to(dtype))
    return torch.add(out, change.to(out.dtype), alpha=multiplier)


def same_delta(first: Delta, second: Delta) -> bool:
    """Whether two deltas are the same: kind, settings, and factors bit for bit with their dtypes."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    fields = [field.name for field in dataclasses.fields(first)]  # type: ignore[arg-type]
    return all(_same(getattr(first, name), getattr(second, name)) for name in fields)


def _same(first: Any, second: Any) -> bool:
    if dataclasses.is_dataclass(first) and dataclasses.is_dataclass(second):  # a delta within a delta
        return same_delta(first, second)  # type: ignore[arg-type]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)
