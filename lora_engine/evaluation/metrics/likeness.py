"""Likeness to real images by an embedder of images only, the usual measure of a subject's fidelity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.evaluation.evidence import Evidence, ImageSet, Measured, measure_sets
from lora_engine.evaluation.metrics import metric, needs_image_embedder

if TYPE_CHECKING:
    from torch import Tensor


@metric(
    "Likeness by DINO",
    "higher",
    "Similarity of a generated image to the real image with the same caption, by the embedder of images only: subject "
    "and composition rather than what CLIP can name (cosine of their embeddings).",
    unmet=needs_image_embedder,
)
def dino_i_paired(evidence: Evidence) -> Measured:
    """Returns the cosine of a generated image and the real image of the same caption."""
    from lora_engine.evaluation.likeness import paired_similarity

    embedder = evidence.require_image_embedder()

    def likeness(images: ImageSet, role: str) -> Tensor:
        real = evidence.embed(images, "reference", embedder)[0]
        return paired_similarity(evidence.embed(images, role, embedder), real)

    return measure_sets(evidence, evidence.reference, likeness)
