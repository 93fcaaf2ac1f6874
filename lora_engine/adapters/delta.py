"""Defines the `Delta` protocol: what an adapter does to one layer. Each kind is one file, and an entry of `KINDS`.

`delta_weight` is the definition of a kind; `forward` is an optimization, which a law test compares with it. Factors
have mathematical names; names from files (`lora_down`, `lora_A`) stay in `formats`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from lora_engine.catalog.kinds import KINDS, Kind
from lora_engine.lazy_torch import torch
from lora_engine.registries import Loaded, import_target

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp
    from lora_engine.adapters.low_rank import LowRankLinear


def fill_kaiming_uniform(factor: Tensor, generator: torch.Generator | None) -> None:
    """Fills a factor as `nn.init.kaiming_uniform_` with a = sqrt(5) does, with the same values.

    Not by `nn.init`: while another thread loads a model, transformers and diffusers replace its functions by ones that
    do nothing.
    """
    fan_in = math.prod(factor.shape[1:])
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    factor.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Issue:
    """One structural error of a delta.

    Attributes:
        factor: Name of the factor, or `alpha`.
        problem: What is wrong, with the value.
        allowed: The valid values.
        remedy: The fix, an imperative.
    """

    factor: str
    problem: str
    allowed: str
    remedy: str


DAMAGED = "save or download the adapter again; the file is damaged or was edited"
OTHER_BASE = "name the base that the adapter was trained for"
"""The remedies of most issues."""


class Delta(Protocol):
    """What one adapter does to one layer: factors, and the weight difference that they define.

    Implementations are frozen dataclasses. `alpha` is None for kinds without one.
    """

    kind: ClassVar[str]
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Names of the factors that are not trained."""
    reads_base: ClassVar[bool] = True
    """True if the difference depends on the values of the base's weight, not only on its shape and dtype."""

    if TYPE_CHECKING:  # at run time, a dataclass would take a property for the default of its field

        @property
        def alpha(self) -> float | None:
            """The alpha of the file. Each kind derives its scale from it."""
            ...

        @property
        def rank(self) -> int | None:
            """The inner dimension; None for kinds without one."""
            ...

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives the kind the short `__repr__`, before `@dataclass` adds one that prints the tensors."""
        super().__init_subclass__(**options)
        cls.__repr__ = Delta.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(factor.shape)}" for name, factor in self.factors().items())
        return f"{type(self).__name__}(rank={self.rank}, alpha={self.alpha}, {shapes})"

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
        """Creates a delta for a layer: factors in float32 on the CPU, and a difference of zero.

        Args:
            weight: Weight of the base. Most kinds read only its shape.
            bias: Bias of the base; None if the layer has none.
            rank: Inner dimension; kinds without one ignore it.
            alpha: None means the kind's default.
            generator: Draws the random factors.
            *args: Unused.
            **options: Keyword options of the kind; see `lora_engine.catalog.kinds`.

        Raises:
            SettingsError: A setting is not valid for the layer.
        """
        ...

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from factors, unchecked (see `issues`). `alpha` None means the kind's default."""
        ...

    def factors(self) -> dict[str, Tensor]:
        """Returns the factors by name."""
        ...

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors (such as parameters) and the same kind, alpha and settings."""
        ...

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns the weight difference at multiplier 1, in float32 or wider and the shape of `base`."""
        ...

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """Returns the bias difference at multiplier 1; None means no difference."""
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
        """Returns the adapted output, in the dtype of `out`, from the input and the base layer's output.

        Law: equals `op(x, base_weight + multiplier * delta_weight(base_weight), bias + multiplier * delta_bias(bias))`.
        Factors are cast to the dtype of `x`. Only the difference reads `x`, because dropout may have changed it. This
        default computes the dense delta.
        """
        return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)

    def fused_forward(self, weight: Tensor, bias: Tensor | None, op: LayerOp) -> LowRankLinear | None:
        """Returns the fused forward of the frozen layer and this delta; None if the kind has none.

        Law: its output and gradients equal those of the layer followed by `forward`.
        """
        return None

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterable[Issue]:
        """Yields structural errors: factor shapes, alpha, and the fit to a weight if its shape is passed."""
        ...

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """The shape of the weight, where the factors determine it; a 1x1 kernel may be omitted."""
        return None

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with factors in the number of dimensions of this weight (1x1 conv or linear)."""
        return self

    def to_export(self) -> Delta:
        """Returns the delta in export form: kinds that exist only in training become the kind that they train."""
        return self


def _delta_class(kind: Kind) -> type[Delta]:
    found = import_target(KINDS, kind.name, kind.delta)
    if not isinstance(found, type) or Delta not in found.__mro__:
        raise KINDS.misfit(kind.name, f"names {kind.delta!r}", "a subclass of lora_engine.adapters.Delta")
    return found


kinds: Mapping[str, type[Delta]] = Loaded(KINDS, _delta_class)
"""The `Delta` class of each kind in `KINDS`."""


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
    """Returns the adapted output, computed from the dense delta. Correct for every kind."""
    dtype = x.dtype if x.is_floating_point() else out.dtype
    bias = delta.delta_bias(base_bias)
    change = op(x, delta.delta_weight(base_weight).to(dtype), None if bias is None else bias.to(dtype))
    return torch.add(out, change.to(out.dtype), alpha=multiplier)


def same_delta(first: Delta, second: Delta) -> bool:
    """Returns True if kind, settings and dtypes of two deltas are equal, and the factors bit for bit."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    fields = [field.name for field in dataclasses.fields(first)]  # type: ignore[arg-type]
    return all(_same(getattr(first, name), getattr(second, name)) for name in fields)


def _same(first: Any, second: Any) -> bool:
    if dataclasses.is_dataclass(first) and dataclasses.is_dataclass(second):  # a delta within a delta
        return same_delta(first, second)  # type: ignore[arg-type]
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)
