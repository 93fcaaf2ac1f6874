"""Metrics of leakage: the subject without its trigger, and changes of prompts that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_engine.evaluation.evidence import Evidence, ImageSet, Measured, RequestSet, measure_sets
from lora_engine.evaluation.metrics import Available, measure_drift, metric, needs_embedder

if TYPE_CHECKING:
    from torch import Tensor


def needs_trigger(available: Available) -> str:
    """Returns the reason if there is no trigger, or the training images are unknown."""
    if available.plan.trigger is None:
        return "the dataset has no trigger"
    return "" if available.plan.trained_on else "the training images are unknown"


@metric(
    "Leak of the subject",
    "lower",
    "Likeness of images without the trigger to the training images (mean cosine of their embeddings). More than the "
    "base's means that the class itself became the subject.",
    unmet=lambda available: needs_embedder(available) or needs_trigger(available),
)
def leak(evidence: Evidence) -> Measured:
    """Returns the mean cosine of images without the trigger with all training images."""
    return measure_sets(evidence, evidence.without_trigger, _likeness(evidence))


@metric(
    "Effect of the trigger",
    "higher",
    "How much more images with the trigger resemble the training images than images of the same prompt without it.",
    unmet=lambda available: needs_embedder(available) or needs_trigger(available),
)
def trigger_effect(evidence: Evidence) -> Measured:
    """Returns the mean cosine with the training images, with the trigger minus without it."""
    likeness = _likeness(evidence)
    without = {images.request.prompt: images for images in evidence.without_trigger}

    def effect(images: ImageSet, role: str) -> Tensor:
        return likeness(images, role) - likeness(without[images.request.prompt_without_trigger], role).mean()

    return measure_sets(evidence, evidence.with_trigger, effect)


@metric(
    "Drift of the class",
    "lower",
    "Change of images of the class word alone (1 - cosine to the base's image of the same seed, 0 is unchanged).",
    is_distance=True,
    optional=True,
    draws=("of_class",),
    unmet=lambda available: (
        needs_embedder(available) or _needs_set(available, "of_class", "the dataset has no class word")
    ),
)
def class_drift(evidence: Evidence) -> Measured:
    """Returns 1 - cosine to the base's image of the same seed, on prompts of the class."""
    return measure_drift(evidence, "of_class")


@metric(
    "Drift of unrelated prompts",
    "lower",
    "Change of images of a fixed list of prompts that name neither the subject nor its class (1 - cosine to the base's "
    "image of the same seed, 0 is unchanged).",
    is_distance=True,
    optional=True,
    draws=("unrelated",),
    unmet=lambda available: needs_embedder(available) or _needs_set(available, "unrelated", "no prompt is unrelated"),
)
def unrelated_drift(evidence: Evidence) -> Measured:
    """Returns 1 - cosine to the base's image of the same seed, on the list of unrelated prompts."""
    return measure_drift(evidence, "unrelated")


def _needs_set(available: Available, name: RequestSet, reason: str) -> str:
    return "" if available.plan.further.get(name) else reason


def _likeness(evidence: Evidence) -> Callable[[ImageSet, str], Tensor]:
    from lora_engine.evaluation.likeness import subject_similarity

    embedder = evidence.require_embedder()
    subject = evidence.subject.embed(embedder)

    def likeness(images: ImageSet, role: str) -> Tensor:
        return subject_similarity(evidence.embed(images, role, embedder), subject)

    return likeness
