"""What a merge of whole checkpoints computes on the tensors of one name: pure functions, in float32 or better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.errors import SettingsError
from lora_engine.merging.ties import ties
from lora_engine.registries import Registry


@dataclass(frozen=True)
class CheckpointMethod:
    """A way to merge checkpoints.

    Attributes:
        merge: (tensors, weights, the method's own options by name) -> the merged tensor.
        usage: Which models it takes in which order, and which weights belong to them.
        models: The fewest models that it takes, and the most; None is any number.
        unweighted: How many of the models have no weight of their own.
        is_elementwise: Whether an element depends on the same element of the others alone, so that blocks will do.
        options: Its own options with their defaults, each above 0; up to 1 for a share.
    """

    merge: Callable[..., Tensor]
    usage: str
    models: tuple[int, int | None]
    unweighted: int
    is_elementwise: bool
    options: tuple[tuple[str, float], ...] = ()

    def check(self, models: int, weights: int, options: Sequence[str]) -> None:
        """Does nothing for a number of models and weights, and names of options, that the method takes.

        Raises:
            SettingsError: They are others.
        """
        least, most = self.models
        if models < least or (most is not None and models > most) or weights != models - self.unweighted:
            raise SettingsError(
                f"{models} models with {weights} weights",
                allowed=self.usage,
                remedy="give the models and the weights that the method takes",
            )
        known = dict(self.options)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise SettingsError(
                f"the method has no option {unknown[0]!r}", allowed=", ".join(known) or "none", remedy="leave it out"
            )


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of each tensor times its weight; the weights are taken as they are."""
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged.add_(tensor, alpha=weight)
    return merged


def add_difference(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`A + w (B - C)`: what has become of C in B, brought into A."""
    first, tuned, base = tensors
    return torch.add(first, tuned - base, alpha=weights[0])


def ties_of_differences(
    tensors: Sequence[Tensor], weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0
) -> Tensor:
    """The first tensor, and the TIES merge of what the others differ from it (see `merging.ties`)."""
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
