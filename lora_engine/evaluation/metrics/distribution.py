"""Metrics of whole sets of images: KID, CMMD and FID between generated and held-out images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.evaluation.distributions import LEAST_FRECHET, LEAST_TRUSTED
from lora_engine.evaluation.evidence import Evidence, Measured
from lora_engine.evaluation.metrics import Available, metric, needs_embedder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _needs_images(least: int) -> Callable[[Available], str]:
    def unmet(available: Available) -> str:
        requests = available.plan.reference
        real, generated = len(requests), sum(len(request.seeds) for request in requests)
        if available.plan.measured_on == "training":
            return "no image was held out"
        if min(real, generated) < least:
            return f"{real} real and {generated} generated images say nothing about distributions; {least} are needed"
        return needs_embedder(available)

    return unmet


@metric(
    "CMMD",
    "lower",
    "Distance of the distributions of generated and real images (CLIP maximum mean discrepancy, times 1,000).",
    optional=True,
    of_whole_sets=True,
    unmet=_needs_images(LEAST_TRUSTED),
)
def cmmd(evidence: Evidence) -> Measured:
    """Returns the CMMD of all images of the captions of real images, as one unit."""
    from lora_engine.evaluation.distributions import mean_discrepancy

    return _of_sets(evidence, mean_discrepancy)


@metric(
    "KID",
    "lower",
    "Distance of the distributions of generated and real images (kernel distance, of this embedder: not comparable "
    "with published values of Inception features).",
    optional=True,
    of_whole_sets=True,
    unmet=_needs_images(LEAST_TRUSTED),
)
def kid(evidence: Evidence) -> Measured:
    """Returns the KID of all images of the captions of real images, as one unit."""
    from lora_engine.evaluation.distributions import kernel_distance

    return _of_sets(evidence, kernel_distance)


@metric(
    "FID",
    "lower",
    "Distance of the distributions of generated and real images (Fréchet distance, of this embedder: not comparable "
    "with published values of Inception features).",
    optional=True,
    of_whole_sets=True,
    unmet=_needs_images(LEAST_FRECHET),
)
def fid(evidence: Evidence) -> Measured:
    """Returns the FID of all images of the captions of real images, as one unit."""
    from lora_engine.evaluation.distributions import frechet_distance

    return _of_sets(evidence, frechet_distance)


def _of_sets(evidence: Evidence, distance: Callable[[Tensor, Tensor], float]) -> Measured:
    import numpy as np
    import torch

    from lora_engine.evaluation.subject import embed_heldout

    embedder = evidence.require_embedder()
    real = embed_heldout(evidence, embedder)
    values = {
        role: np.array([distance(real, torch.cat([evidence.embed(s, role, embedder) for s in evidence.reference]))])
        for role in evidence.roles
    }
    return Measured(values, ("all images",))
