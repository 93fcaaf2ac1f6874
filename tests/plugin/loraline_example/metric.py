"""The metric `example_sharpness`. Must not import torch or numpy, except in functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.evaluation.evidence import Evidence, ImageSet, Measured, measure_sets
from lora_engine.evaluation.metrics import metric

if TYPE_CHECKING:
    from torch import Tensor


@metric("Sharpness", "higher", "Mean absolute difference of neighboring pixels, as a share of the full range.")
def example_sharpness(evidence: Evidence) -> Measured:
    """Returns one value per prompt and model."""

    def sharpness(images: ImageSet, role: str) -> Tensor:
        return images.images[role].double().diff(dim=-1).abs().mean(dim=(1, 2, 3)) / 255.0

    return measure_sets(evidence, evidence.with_trigger, sharpness)
