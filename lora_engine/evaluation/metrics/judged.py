"""Metrics by the answers of a vision-language model, the judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.evaluation.evidence import Evidence, Measured, measure_sets
from lora_engine.evaluation.metrics import Available, metric

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.evaluation.evidence import ImageSet


def needs_judge(available: Available) -> str:
    """Returns the reason if there is no judge."""
    return "" if available.judge else "no vision-language model (judge)"


@metric(
    "Agreement by the judge",
    "higher",
    "How well an image shows what its prompt says, without the trigger: answer of the judge from 1 (not at all) to 5 "
    "(all of it).",
    unmet=needs_judge,
    optional=True,
    judged=True,
)
def judged_agreement(evidence: Evidence) -> Measured:
    """Returns the scores of the images of the prompts."""
    return _of_answers(evidence, "judged_agreement", evidence.with_trigger)


@metric(
    "Preference of the judge",
    "higher",
    "Which of two images of the same prompt and seed shows better what the prompt says: probability that the judge "
    "prefers the image to the base's, asked in both orders (0.5 is equally good).",
    unmet=needs_judge,
    optional=True,
    judged=True,
)
def judged_preference(evidence: Evidence) -> Measured:
    """Returns the probabilities that images are better than the base's; 0.5 for the base itself."""
    return _of_answers(evidence, "judged_preference", evidence.with_trigger)


@metric(
    "Likeness by the judge",
    "higher",
    "Whether a generated image shows the same subject as the real image with the same caption: answer of the judge "
    "from 1 (another subject) to 5 (exactly the same subject).",
    unmet=needs_judge,
    optional=True,
    judged=True,
)
def judged_likeness(evidence: Evidence) -> Measured:
    """Returns the scores of the images of the captions of real images."""
    return _of_answers(evidence, "judged_likeness", evidence.reference)


def _of_answers(evidence: Evidence, name: str, sets: tuple[ImageSet, ...]) -> Measured:
    judgement = evidence.require_judgement()
    answers = judgement.values[name]

    def scores(images: ImageSet, role: str) -> Tensor:
        return answers[images.request, role]

    return measure_sets(evidence, sets, scores)
