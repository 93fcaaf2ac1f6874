"""Merge methods for whole checkpoints: pure functions over the tensors of one name, in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        unweighted: Number of models without a weight.
        is_elementwise: True if each element depends only on the same elements of the other tensors; allows blocks.
        options: Options with their defaults, all above 0; shares are at most 1.
    """

    merge: Callable[..., Tensor]
    usage: str
    models: tuple[int, int | None]
    unweighted: int
    is_elementwise: bool
    options: tuple[tuple[str, float], ...] = ()

    def check(self, models: int, weights: int, options: Sequence[str]) -> None:
        """Raises `SettingsError` if the method does not accept the numbers of models and weights, or an option.

        Raises:
            SettingsError: A number is wrong, or an option is unknown.
        """
        minimum, maximum = self.models
        if models < minimum or (maximum is not None and models > maximum) or weights != models - self.unweighted:
            raise SettingsError(
                f"{models} models with {weights} weights",
                allowed=self.usage,
                remedy="pass the models and the weights that the method needs",
            )
        defaults = dict(self.options)
        unknown = [name for name in options if name not in defaults]
        if unknown:
            raise SettingsError(
                f"the method has no option {unknown[0]!r}", allowed=", ".join(defaults) or "none", remedy="leave it out"
            )


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
    "weighted-sum", CheckpointMethod(weighted_sum, "any number of models, a weight for each", (1, None), 0, True)
)
CHECKPOINT_METHODS.add(
    "add-difference",
    CheckpointMethod(add_difference, "three models A, B, C and one weight w, for A + w (B - C)", (3, 3), 2, True),
)
CHECKPOINT_METHODS.add(
    "ties",
    CheckpointMethod(
        ties_of_differences,
        "the base that all were tuned from, then the models, a weight for each but the base",
        (2, None),
        1,
        False,
        (("density", 0.5), ("scale", 1.0)),
    ),
)
