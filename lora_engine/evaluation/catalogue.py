"""Which metrics there are and what each one says, in words. Torch-free; the functions are in `metrics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_engine.registries import Registry


@dataclass(frozen=True)
class MetricInfo:
    """What a person needs to know to read a metric.

    Attributes:
        title: Its name in a table.
        better: Which direction is wanted.
        meaning: One sentence.
        is_distance: Whether it is a distance to the base, whose own value is 0: then no adapter could be "better", and
            how much is too much is for a gate to say.
    """

    title: str
    better: Literal["higher", "lower"]
    meaning: str
    is_distance: bool = False


CATALOGUE: Registry[MetricInfo] = Registry("metric")

CATALOGUE.add(
    "clip_i_paired",
    MetricInfo(
        "Likeness to the real picture",
        "higher",
        "How alike a generated picture and the real picture with the same caption are, as the embedder sees them "
        "(cosine, 1 is identical).",
    ),
)
CATALOGUE.add(
    "clip_t",
    MetricInfo(
        "Agreement with the prompt",
        "higher",
        "How well a generated picture fits its prompt, read without the trigger word (cosine of picture and text).",
    ),
)
CATALOGUE.add(
    "drift",
    MetricInfo(
        "Drift without the trigger",
        "lower",
        "How far the adapter moves pictures whose prompt does not ask for the concept (1 - cosine to the base's "
        "picture of the same seed, 0 is untouched).",
        is_distance=True,
    ),
)
CATALOGUE.add(
    "drift_pixels",
    MetricInfo(
        "Drift in pixels",
        "lower",
        "The same comparison in plain pixels: root mean square difference as a share of the full range.",
        is_distance=True,
    ),
)
CATALOGUE.add(
    "validation_loss",
    MetricInfo(
        "Validation loss",
        "lower",
        "The training loss on pictures with noise and time steps held fixed, so that two models can be compared.",
    ),
)
