"""Metrics of persons: faces in generated images, and their identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_engine.evaluation.evidence import Evidence, ImageSet, Measured, measure_sets
from lora_engine.evaluation.metrics import Available, metric

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.evaluation.identity import FaceMatch


def needs_faces(available: Available) -> str:
    """Returns the reason if there is no embedder of faces, or no training image shows exactly one face."""
    if not available.face_embedder:
        return "no embedder of faces (face_embedder)"
    if not available.plan.trained_on:
        return "the training images are unknown"
    from lora_engine.evaluation.subject import SubjectImages

    return "" if SubjectImages(available.plan.trained_on).has_faces() else "no training image shows exactly one face"


@metric(
    "Identity",
    "higher",
    "Similarity of the face in a generated image to the faces of the training images (cosine of their embeddings; of "
    "several faces the most similar; 0 if there is none).",
    unmet=needs_faces,
)
def identity(evidence: Evidence) -> Measured:
    """Returns the similarity of the faces in each image to those of the training images."""
    return _of_faces(evidence, lambda match: match.similarity)


@metric(
    "Faces found",
    "higher",
    "Share of generated images in which a face is found.",
    unmet=needs_faces,
)
def faces_found(evidence: Evidence) -> Measured:
    """Returns 1 for each image with a face, else 0."""
    return _of_faces(evidence, lambda match: float(match.faces > 0))


def _of_faces(evidence: Evidence, value: Callable[[FaceMatch], float]) -> Measured:
    import torch

    embedder = evidence.require_face_embedder()

    def of_images(images: ImageSet, role: str) -> Tensor:
        return torch.tensor([value(match) for match in evidence.subject.match(images, role, embedder)])

    return measure_sets(evidence, evidence.with_trigger, of_images)
