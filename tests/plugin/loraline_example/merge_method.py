"""The merge method `example-median`. Must not import torch, except in functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lora_engine.merging.methods import Elementwise
from lora_engine.merging.spec import MergeOptions

if TYPE_CHECKING:
    from torch import Tensor


class Median(MergeOptions):
    """The median of the weighted deltas, element by element."""

    method: Literal["example-median"] = "example-median"


def median(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns the median of each element; of two, the mean."""
    import torch

    return torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)]).quantile(0.5, dim=0)


METHOD = Elementwise(spec=Median, title="median of each element", merge=median)
