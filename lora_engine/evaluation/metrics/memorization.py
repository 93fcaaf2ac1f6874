"""Metrics of overfitting: nearness to training images, copies, loss gap, sensitivity to the prompt, diversity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.evaluation.evidence import BASE, Evidence, ImageSet, Measured, measure_sets
from lora_engine.evaluation.metrics import Available, metric, needs_embedder

if TYPE_CHECKING:
    from torch import Tensor


def needs_both_splits(available: Available) -> str:
    """Returns the reason if there are no held-out images, or no training images."""
    if available.plan.measured_on == "training":
        return "no image was held out"
    return "" if available.plan.trained_on else "the training images are unknown"


def needs_prompts(available: Available) -> str:
    """Returns the reason if there is one prompt only."""
    return "" if len(available.plan.with_trigger) > 1 else "there is one prompt only"


def needs_seeds(available: Available) -> str:
    """Returns the reason if a prompt has one image only."""
    return "" if len(available.plan.with_trigger[0].seeds) > 1 else "a prompt has one image only (seeds: 1)"


@metric(
    "Nearness to training images",
    "lower",
    "How much more a generated image resembles the nearest training image than the nearest held-out one (difference of "
    "cosines; among equally many of both, so 0 is expected without memorization).",
    unmet=lambda available: needs_embedder(available) or needs_both_splits(available),
)
def nearest_training(evidence: Evidence) -> Measured:
    """Returns the cosine with the nearest training image minus that with the nearest held-out image."""
    from lora_engine.evaluation.likeness import nearest_similarity
    from lora_engine.evaluation.subject import embed_heldout

    embedder = evidence.require_embedder()
    training, heldout = evidence.subject.embed(embedder), embed_heldout(evidence, embedder)
    among = min(len(training), len(heldout))

    def nearness(images: ImageSet, role: str) -> Tensor:
        vectors = evidence.embed(images, role, embedder)
        return nearest_similarity(vectors, training, among) - nearest_similarity(vectors, heldout, among)

    return measure_sets(evidence, evidence.with_trigger, nearness)


@metric(
    "Copies of training images",
    "lower",
    "Share of generated images that are near-copies of a training image: their perceptual hashes, plain or mirrored, "
    "differ in at most 24 of 256 bits. The base's share is the false alarms.",
    unmet=lambda available: "" if available.plan.trained_on else "the training images are unknown",
)
def copies(evidence: Evidence) -> Measured:
    """Returns 1 for each generated image that copies a training image, else 0."""
    import torch

    from lora_engine.data.duplicates import take_print
    from lora_engine.evaluation.copies import find_copies
    from lora_engine.evaluation.subject import to_images

    training = evidence.subject.prints()

    def share(images: ImageSet, role: str) -> Tensor:
        found = find_copies([take_print(image) for image in to_images(images.images[role])], training)
        return torch.tensor([float(index in found) for index in range(len(images.images[role]))])

    return measure_sets(evidence, evidence.with_trigger, share)


@metric(
    "Loss gap",
    "lower",
    "How much more the loss of training images fell than that of held-out images, with the same noise (0 is equally). "
    "Every training widens it; compare versions, or set a gate.",
    is_distance=True,
    unmet=needs_both_splits,
)
def loss_gap(evidence: Evidence) -> Measured:
    """Returns how much the gap of each held-out image to the mean training image is wider than the base's."""
    from lora_engine.evaluation.bands import training_gap

    heldout, training = evidence.mean_losses()
    gaps = {role: training_gap(losses, training[role]) for role, losses in heldout.items()}
    return Measured({role: gap - gaps[BASE] for role, gap in gaps.items()}, evidence.heldout.groups)


@metric(
    "Memorized share",
    "lower",
    "Share of what was learned of the training images that does not carry over to held-out images: 1 - the fall of "
    "their loss over the fall of the training images' loss (0 is none, 1 is all).",
    is_distance=True,
    unmet=needs_both_splits,
)
def memorized_share(evidence: Evidence) -> Measured:
    """Returns 1 - the fall of each held-out image's loss over the mean fall of the training images' losses."""
    from lora_engine.evaluation.bands import share_memorized

    heldout, training = evidence.mean_losses()
    values = {
        role: share_memorized((heldout[BASE], losses), (training[BASE], training[role]))
        for role, losses in heldout.items()
    }
    return Measured(values, evidence.heldout.groups)


@metric(
    "Sensitivity to the prompt",
    "higher",
    "How much better a generated image fits its own prompt than the other prompts (difference of cosines; 0 if the "
    "images are the same whatever the prompt says).",
    unmet=lambda available: needs_embedder(available) or needs_prompts(available),
)
def prompt_sensitivity(evidence: Evidence) -> Measured:
    """Returns the cosine of a generated image with its prompt minus the mean cosine with the other prompts."""
    from lora_engine.evaluation.likeness import prompt_margin

    embedder, sets = evidence.require_embedder(), evidence.with_trigger
    texts = embedder.embed_texts([images.request.prompt_without_trigger for images in sets])
    rows = {images.request: row for row, images in enumerate(sets)}

    def margin(images: ImageSet, role: str) -> Tensor:
        return prompt_margin(evidence.embed(images, role, embedder), texts, rows[images.request])

    return measure_sets(evidence, sets, margin)


@metric(
    "Diversity",
    "higher",
    "Mean distance between the images of one prompt with different seeds (1 - cosine of their embeddings).",
    unmet=lambda available: needs_embedder(available) or needs_seeds(available),
)
def diversity(evidence: Evidence) -> Measured:
    """Returns the mean distance of each generated image from the others of its prompt."""
    from lora_engine.evaluation.likeness import seed_distance

    embedder = evidence.require_embedder()

    def distance(images: ImageSet, role: str) -> Tensor:
        return seed_distance(evidence.embed(images, role, embedder))

    return measure_sets(evidence, evidence.with_trigger, distance)
