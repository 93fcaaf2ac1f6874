"""Describes the metrics for tables and reports. Torch-free; the functions are in `metrics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_engine.registries import Registry


@dataclass(frozen=True)
class MetricInfo:
    """The description of a metric.

    Attributes:
        title: Name in tables.
        better: The better direction.
        meaning: Description in one sentence.
        is_distance: True for a distance to the base, whose own value is 0; a gate sets the limit, and no adapter is
            "better".
    """

    title: str
    better: Literal["higher", "lower"]
    meaning: str
    is_distance: bool = False


CATALOGUE: Registry[MetricInfo] = Registry("metric")

CATALOGUE.add(
    "clip_i_paired",
    MetricInfo(
        "Likeness to the real image",
        "higher",
        "Similarity of a generated image to the real image with the same caption (cosine of their embeddings, 1 is "
        "identical).",
    ),
)
CATALOGUE.add(
    "clip_t",
    MetricInfo(
        "Agreement with the prompt",
        "higher",
        "Similarity of a generated image to its prompt without the trigger word (cosine of image and text embeddings).",
    ),
)
CATALOGUE.add(
    "drift",
    MetricInfo(
        "Drift without the trigger",
        "lower",
        "Change of images whose prompt does not name the concept (1 - cosine to the base's image of the same seed, 0 "
        "is unchanged).",
        is_distance=True,
    ),
)
CATALOGUE.add(
    "drift_pixels",
    MetricInfo(
        "Drift in pixels",
        "lower",
        "The same comparison in pixels: root mean square difference as a share of the full range.",
        is_distance=True,
    ),
)
CATALOGUE.add(
    "validation_loss",
    MetricInfo(
        "Validation loss",
        "lower",
        "Training loss with fixed noise and time steps, which makes two models comparable.",
    ),
)
