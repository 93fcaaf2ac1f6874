"""Registers the merge methods by name. A method returns coefficients, or merges dense deltas elementwise.

To add a method: write a pure function in its own file, its options in `spec`, and a line here.
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

    LoRA adapters are combined exactly by concatenated factors; other kinds as dense deltas.

    Attributes:
        name: Name in specs and on the command line.
        coefficients: (weights, gram, options by name) -> one coefficient per delta.
        adapters: Required number of adapters; None means any number.
        lora_only: True if other kinds are an error.
        sees_deltas: True if the coefficients depend on the deltas (the Gram matrix), not only on the weights.
    """

    name: str
    coefficients: Callable[..., list[float]]
    adapters: int | None = None
    lora_only: bool = False
    sees_deltas: bool = False

    @property
    def spec(self) -> type[MergeOptions]:
        """The class of its options."""
        return SPECS[self.name]


@dataclass(frozen=True)
class Elementwise:
    """A method that works on the elements of dense deltas, module by module.

    Attributes:
        name: Name in specs and on the command line.
        merge: (deltas, weights, options by name[, generators]) -> the merged delta.
        draws: True if it needs `generators`, one per delta.
        adapters: Required number of adapters; None means any number.
    """

    name: str
    merge: Callable[..., Tensor]
    draws: bool = False
    adapters: int | None = None

    @property
    def spec(self) -> type[MergeOptions]:
        """The class of its options."""
        return SPECS[self.name]


MergeMethod = Combination | Elementwise
METHODS: Registry[MergeMethod] = Registry("merge method")


def _learned(weights: list[float], gram: Any, **_: Any) -> list[float]:
    """Returns the weights, which `learned.learn_weights` computed."""
    return linear(weights, gram)


for _method in (
    Combination("concatenate", linear, lora_only=True),
    Combination("linear", linear),
    Combination("interpolate", interpolate),
    Combination("svd", linear),
    Combination("slerp", slerp, adapters=2, sees_deltas=True),
    Combination("model-stock", model_stock, sees_deltas=True),
    Combination("geometric-median", geometric_median, sees_deltas=True),
    Combination("learned", _learned),
    Elementwise("ties", ties),
    Elementwise("dare", dare, draws=True),
    Elementwise("dare-ties", dare_ties, draws=True),
    Elementwise("della", della, draws=True),
    Elementwise("magnitude-prune", magnitude_prune),
):
    METHODS.add(_method.name, _method)
