"""The metrics, one entry each: a function from evidence to values per model, and its description.

Importing this module imports neither torch nor numpy; the functions do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_engine.evaluation.evidence import BASE, Evidence, ImageSet, Measured, RequestSet, measure_sets
from lora_engine.registries import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.evaluation.plan import EvaluationPlan, Request


@dataclass(frozen=True)
class Available:
    """What is known before anything is drawn.

    Attributes:
        plan: The requests.
        embedder: True if there is an embedder of images and texts.
        image_embedder: True if there is an embedder of images only.
        face_embedder: True if there is an embedder of faces.
        judge: True if there is a judge.
    """

    plan: EvaluationPlan
    embedder: bool
    image_embedder: bool
    face_embedder: bool = False
    judge: bool = False


def needs_nothing(available: Available) -> str:
    """Returns no reason."""
    del available
    return ""


def needs_embedder(available: Available) -> str:
    """Returns the reason if there is no embedder of images and texts."""
    return "" if available.embedder else "no embedder of images and texts"


def needs_image_embedder(available: Available) -> str:
    """Returns the reason if there is no embedder of images only."""
    return "" if available.image_embedder else "no embedder of images"


MeasureMetric = Callable[[Evidence], Measured]
Unmet = Callable[[Available], str]


@dataclass(frozen=True)
class Metric:
    """A metric, one entry of `METRICS`.

    Attributes:
        name: Name in gates, reports and MLflow.
        measure: Returns the values of every model.
        title: Name in tables.
        better: The better direction.
        meaning: Description in one sentence.
        is_distance: True for a distance to the base, whose own value is 0; a gate sets the limit, and no adapter is
            "better" than the base.
        headline: Sentence at the top of a report, with `{verdict}`, `{adapter}` and `{base}`; empty for none.
        verdicts: `{verdict}` of the headline by better, worse and unclear.
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
        unmet: Returns why it cannot be measured, before anything is drawn; empty if it can.
        optional: True measures it only if `extra` or a gate names it.
        draws: Sets of requests that are drawn for this metric alone.
        of_whole_sets: True if it measures all images at once: one unit, which never has an interval.
        judged: True if it is from answers of the judge, and measured if there is one.
    """

    name: str
    measure: MeasureMetric
    title: str
    better: Literal["higher", "lower"]
    meaning: str
    is_distance: bool = False
    headline: str = ""
    verdicts: tuple[str, str, str] = ("better", "worse", "not clearly different")
    revision: int = 0
    unmet: Unmet = needs_nothing
    optional: bool = False
    draws: tuple[RequestSet, ...] = ()
    of_whole_sets: bool = False
    judged: bool = False


METRICS: Registry[Metric] = Registry(
    "metric", entry=Metric, source="lora_engine.evaluation.metrics", group="loraline.metrics"
)


def metric(
    title: str,
    better: Literal["higher", "lower"],
    meaning: str,
    *,
    is_distance: bool = False,
    headline: str = "",
    verdicts: tuple[str, str, str] = ("better", "worse", "not clearly different"),
    revision: int = 0,
    unmet: Unmet = needs_nothing,
    optional: bool = False,
    draws: tuple[RequestSet, ...] = (),
    of_whole_sets: bool = False,
    judged: bool = False,
) -> Callable[[MeasureMetric], Metric]:
    """Returns a decorator that makes a function a `Metric` of the same name (arguments: see there)."""

    def declare(measure: MeasureMetric) -> Metric:
        return Metric(
            measure.__name__,
            measure,
            title,
            better,
            meaning,
            is_distance,
            headline,
            verdicts,
            revision,
            unmet,
            optional,
            draws,
            of_whole_sets,
            judged,
        )

    return declare


@metric(
    "Likeness to the real image",
    "higher",
    "Similarity of a generated image to the real image with the same caption (cosine of their embeddings, 1 is "
    "identical).",
    headline="With the adapter, images are {verdict} the real ones than the base's: likeness {adapter:.2f} instead of "
    "{base:.2f}.",
    verdicts=("closer to", "further from", "not clearly closer to"),
    unmet=needs_embedder,
)
def clip_i_paired(evidence: Evidence) -> Measured:
    """Returns the cosine of a generated image and the real image of the same caption (unpaired means mislead)."""
    embedder = evidence.require_embedder()

    def likeness(images: ImageSet, role: str) -> Tensor:
        return evidence.embed(images, role, embedder) @ evidence.embed(images, "reference", embedder)[0]

    return measure_sets(evidence, evidence.reference, likeness)


@metric(
    "Agreement with the prompt",
    "higher",
    "Similarity of a generated image to its prompt without the trigger word (cosine of image and text embeddings).",
    unmet=needs_embedder,
)
def clip_t(evidence: Evidence) -> Measured:
    """Returns the cosine of a generated image and its prompt without the trigger, which no embedder knows."""
    embedder = evidence.require_embedder()
    requests = [images.request for images in evidence.with_trigger]
    vectors = embedder.embed_texts([request.prompt_without_trigger for request in requests])
    texts: dict[Request, Tensor] = dict(zip(requests, vectors, strict=True))

    def agreement(images: ImageSet, role: str) -> Tensor:
        return evidence.embed(images, role, embedder) @ texts[images.request]

    return measure_sets(evidence, evidence.with_trigger, agreement)


@metric(
    "Drift without the trigger",
    "lower",
    "Change of images whose prompt does not name the concept (1 - cosine to the base's image of the same seed, 0 is "
    "unchanged).",
    is_distance=True,
    headline="Without the trigger it changes the base's images by {adapter:.2f} (0 is unchanged).",
    unmet=needs_embedder,
)
def drift(evidence: Evidence) -> Measured:
    """Returns 1 - cosine to the base's image of the same seed, on prompts without the trigger; 0 for the base."""
    return measure_drift(evidence, "without_trigger")


@metric(
    "Drift in pixels",
    "lower",
    "The same comparison in pixels: root mean square difference as a share of the full range.",
    is_distance=True,
)
def drift_pixels(evidence: Evidence) -> Measured:
    """Returns the root mean square difference to the base's image of the same seed, as a share of the full range."""

    def distance(images: ImageSet, role: str) -> Tensor:
        difference = (images.images[role].double() - images.images[BASE].double()) / 255.0
        return difference.square().mean(dim=(1, 2, 3)).sqrt()

    return measure_sets(evidence, evidence.without_trigger, distance)


@metric(
    "Validation loss",
    "lower",
    "Training loss with fixed noise and time steps, which makes two models comparable.",
)
def validation_loss(evidence: Evidence) -> Measured:
    """Returns the denoising losses on the fixed grid of time steps, one value per real image."""
    losses = evidence.heldout
    return Measured({role: values.mean(axis=1) for role, values in losses.values.items()}, losses.groups)


def measure_drift(evidence: Evidence, name: RequestSet) -> Measured:
    """Returns 1 - cosine to the base's image of the same seed, on a set of requests; 0 for the base."""
    embedder = evidence.require_embedder()

    def distance(images: ImageSet, role: str) -> Tensor:
        vectors, base = (evidence.embed(images, model, embedder) for model in (role, BASE))
        # Rounding makes the cosine of a vector with itself slightly less or more than 1.
        cosine = (vectors * base).sum(dim=-1)
        return (1.0 - cosine).clamp(min=0.0) if role != BASE else cosine * 0.0

    return measure_sets(evidence, evidence.sets[name], distance)
