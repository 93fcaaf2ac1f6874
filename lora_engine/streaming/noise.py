"""Bounds the rounding error of stored weights, from the spacing of their dtypes and their scales."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lora_engine.checkpoints.scales import multiply, read_scale
from lora_engine.streaming.inputs import read_location
from lora_engine.streaming.model import TensorLocation


def rounding_variance(weight: Tensor) -> Tensor:
    """Returns the variance of the rounding error of each element of a weight, in float64 and its shape.

    The error is uniform within half of the spacing between neighboring numbers: spacing^2 / 12.
    """
    limits = torch.finfo(weight.dtype)
    spacing = torch.exp2(torch.frexp(weight.float()).exponent.double()).mul_(limits.eps / 2)
    return spacing.clamp_(min=limits.smallest_normal * limits.eps).square_().div_(12)


def location_variance(location: TensorLocation) -> Tensor:
    """Returns `rounding_variance` of a stored weight in its module's shape; that of a scaled one is of its values."""
    stored, scale = location.stored, read_scale(location.stored)
    variance = rounding_variance(read_location(replace(location, stored=replace(stored, scale=None))))
    if scale is None:
        return variance
    factors = torch.ones(stored.shape[0], math.prod(stored.shape[1:]))
    return variance.mul_(location.view(multiply(factors, scale, 0)).double().square_())
