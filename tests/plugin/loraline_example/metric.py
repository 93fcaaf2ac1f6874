"""The metric `example_sharpness`. Must not import torch or numpy, except in functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.evaluation.metrics import Evidence, Pair, metric

if TYPE_CHECKING:
    from torch import Tensor


@metric("Sharpness", "higher", "Mean absolute difference of neighboring pixels, as a share of the full range.")
def example_sharpness(evidence: Evidence) -> Pair:
    """Returns one value per prompt, for base and adapter."""
    import numpy as np

    def sharpness(images: Tensor) -> float:
        return float(images.double().diff(dim=-1).abs().mean()) / 255.0

    pairs = evidence.with_trigger
    return np.array([sharpness(pair.base) for pair in pairs]), np.array([sharpness(pair.adapter) for pair in pairs])
