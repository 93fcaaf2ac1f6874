"""The merge methods by name, each in one of two spaces, with the spec of what may be set about it.

To add a method: a pure function in a file of its own, its spec in `spec`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_engine.merging.combinations import interpolate, linear
from lora_engine.merging.dare import dare, dare_ties
from lora_engine.merging.della import della
from lora_engine.merging.geometric_median import geometric_median
from lora_engine.merging.model_stock import model_stock
from lora_engine.merging.prune import magnitude_prune
from lora_engine.merging.slerp import slerp
from lora_engine.merging.spec import SPECS, MergeOptions
from lora_engine.merging.ties import ties
from lora_engine.registries import Registry


@dataclass(frozen=True)
class Combination:
    """A method whose result is a linear combination of the deltas.

    LoRA adapters are combined exactly, their factors side by side; other kinds as dense deltas.

    Attributes:
        name: In specs and on the command line.
        coefficients: (weights, gram, the method's own parameters by name) -> one coefficient a delta.
        adapters: How many adapters it takes; None is any number.
        lora_only: Whether other kinds are refused.
        sees_deltas: Whether the coefficients depend on the deltas (the Gram matrix), and not on the weights alone.
    """

    name: str
    coefficients: Callable[..., list[float]]
    adapters: int | None = None
    lora_only: bool = False
    sees_deltas: bool = False

    @property
    def spec(self) -> type[MergeOptions]:
        """What may be set about it."""
        return SPECS[self.name]


@dataclass(frozen=True)
class Elementwise:
    """A method that works on the elements of dense deltas, module by module.

    Attributes:
        name: In specs and on the command line.
        merge: (deltas, weights, the method's own parameters by name[, generators]) -> the merged delta.
        draws: Whether it takes `generators`, one a delta.
    """

    name: str
    merge: Callable[..., Tensor]
    draws: bool = False
    adapters: int | None = None

    @property
    def spec(self) -> type[MergeOptions]:
        """What may be set about it."""
        return SPECS[self.name]


MergeMethod = Combination | Elementwise
METHODS: Registry[MergeMethod] = Registry("merge method")


def _given(weights: list[float], gram: Any, **_: Any) -> list[float]:
    """The weights, which `learned.learn_weights` has found."""
    return linear(weights, gram)


for _method in (
    Combination("concatenate", linear, lora_only=True),
    Combination("linear", linear),
    Combination("interpolate", interpolate),
    Combination("svd", linear),
    Combination("slerp", slerp, adapters=2, sees_deltas=True),
    Combination("model-stock", model_stock, sees_deltas=True),
    Combination("geometric-median", geometric_median, sees_deltas=True),
    Combination("learned", _given),
    Elementwise("ties", ties),
    Elementwise("dare", dare, draws=True),
    Elementwise("dare-ties", dare_ties, draws=True),
    Elementwise("della", della, draws=True),
    Elementwise("magnitude-prune", magnitude_prune),
):
    METHODS.add(_method.name, _method)
