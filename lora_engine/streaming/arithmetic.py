"""Merge methods for whole checkpoints: pure functions over the tensors of one name, in float32 or wider."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import SettingsError
from lora_engine.merging.methods.ties import ties
from lora_engine.registries import Registry


@dataclass(frozen=True)
class CheckpointMethod:
    """A method that merges checkpoints.

    Attributes:
        merge: (tensors, weights, options by name) -> the merged tensor.
        usage: The required models, their order and their weights, for error messages.
        models: Minimum and maximum number of models; None means no maximum.
        weighted: Positions of the models that have a weight.
        shares: True if the weights are shares of the result, which keeps its size only if they sum to 1.
        is_elementwise: True if each element depends only on the same elements of the other tensors; allows blocks.
        options: Options with their defaults, all above 0; shares are at most 1.
    """

    merge: Callable[..., Tensor]
    usage: str
    models: tuple[int, int | None]
    weighted: slice
    shares: bool
    is_elementwise: bool
    options: tuple[tuple[str, float], ...] = ()

    def weights_for(self, given: Sequence[float | None]) -> list[float]:
        """Returns the weights of a merge from one entry per model; None means not given.

        Shares that are not given are equal parts of what the others leave of 1. Other weights default to 1.

        Raises:
            SettingsError: The number of models is wrong, a model has a weight that the method does not use, or the
                given shares leave nothing for the other models.
        """
        positions = range(len(given))[self.weighted]
        self.check(len(given), len(positions), {})
        for position, weight in enumerate(given):
            if weight is not None and position not in positions:
                raise SettingsError(
                    f"model {position + 1} has the weight {weight:g}",
                    allowed=self.usage,
                    remedy="remove the weight, or give it to a model that has one",
                )
        weights = [given[position] for position in positions]
        known = [weight for weight in weights if weight is not None]
        if not self.shares or len(known) == len(weights):
            return [1.0 if weight is None else weight for weight in weights]
        rest = 1.0 - math.fsum(known)
        if not rest > 0.0:
            raise SettingsError(
                f"the given weights sum to {1.0 - rest:g}, which leaves nothing for the other models",
                allowed="a weight for every model, or weights with a sum below 1",
                remedy="give every model a weight",
            )
        return [rest / (len(weights) - len(known)) if weight is None else weight for weight in weights]

    def check(self, models: int, weights: int, options: Mapping[str, Any]) -> None:
        """Raises `SettingsError` if the method does not accept the numbers of models and weights, or an option.

        Raises:
            SettingsError: A number is wrong, or an option is unknown or has an invalid value.
        """
        minimum, maximum = self.models
        if models < minimum or (maximum is not None and models > maximum):
            raise SettingsError(f"{models} models", allowed=self.usage, remedy="pass the models that the method needs")
        if weights != len(range(models)[self.weighted]):
            raise SettingsError(
                f"{models} models with {weights} weights",
                allowed=self.usage,
                remedy="pass the weights that the method needs",
            )
        defaults = dict(self.options)
        for name, value in options.items():
            if name not in defaults:
                raise SettingsError(
                    f"the method has no option {name!r}", allowed=", ".join(defaults) or "none", remedy="leave it out"
                )
            _check_option(name, value)


def _check_option(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    maximum = 1.0 if name == "density" else math.inf
    if not is_number or not 0.0 < value <= maximum or not math.isfinite(value):
        allowed = "above 0, up to 1" if name == "density" else "a finite number above 0"
        raise SettingsError(f"{name} is {value!r}", allowed=allowed, remedy="choose another value")


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns the sum of each tensor times its weight; does not normalize the weights."""
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged.add_(tensor, alpha=weight)
    return merged


def add_difference(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns `A + w (B - C)`: applies the change from C to B to A."""
    first, tuned, base = tensors
    return torch.add(first, tuned - base, alpha=weights[0])


def ties_of_differences(
    tensors: Sequence[Tensor], weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0
) -> Tensor:
    """Returns the first tensor plus the TIES merge of the others' differences from it (see `merging.methods.ties`)."""
    base, *tuned = tensors
    return base + ties([tensor - base for tensor in tuned], weights, density=density, scale=scale)


CHECKPOINT_METHODS: Registry[CheckpointMethod] = Registry("checkpoint merge method")
CHECKPOINT_METHODS.add(
    "weighted-sum",
    CheckpointMethod(weighted_sum, "any number of models, a weight for each", (1, None), slice(None), True, True),
)
CHECKPOINT_METHODS.add(
    "add-difference",
    CheckpointMethod(
        add_difference,
        "three models A, B, C; B has the weight w, for A + w (B - C)",
        (3, 3),
        slice(1, 2),
        False,
        True,
    ),
)
CHECKPOINT_METHODS.add(
    "ties",
    CheckpointMethod(
        ties_of_differences,
        "the base that all were tuned from, then the models, a weight for each but the base",
        (2, None),
        slice(1, None),
        False,
        False,
        (("density", 0.5), ("scale", 1.0)),
    ),
)
