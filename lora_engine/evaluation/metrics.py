"""The metrics, one entry each: a function from evidence to paired values, and its description.

Importing this module imports neither torch nor numpy; the functions do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_engine.registries import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.evaluation.embedder import Embedder
    from lora_engine.evaluation.plan import Request
    from lora_engine.evaluation.statistics import Values


@dataclass(frozen=True)
class ImagePair:
    """The images of base and adapter for one request, with the same seeds.

    Attributes:
        request: The request.
        base: uint8 [seeds, 3, height, width].
        adapter: The same with the adapter attached.
        reference: The real image, float32 [3, height, width] in [-1, 1]; None if the request has none.
    """

    request: Request
    base: Tensor
    adapter: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """The input of the metrics.

    Attributes:
        reference: Images for the captions of real images.
        with_trigger: Images for the prompts.
        without_trigger: Images for the prompts without the trigger.
        losses: Denoising losses of base and adapter, one value per real image.
        embedder: The embedder of images and texts.
    """

    reference: tuple[ImagePair, ...]
    with_trigger: tuple[ImagePair, ...]
    without_trigger: tuple[ImagePair, ...]
    losses: tuple[Values, Values]
    embedder: Embedder


Pair = tuple["Values", "Values"]


@dataclass(frozen=True)
class Metric:
    """A metric, one entry of `METRICS`.

    Attributes:
        name: Name in gates, reports and MLflow.
        measure: Returns the values of base and adapter, one per unit of resampling.
        title: Name in tables.
        better: The better direction.
        meaning: Description in one sentence.
        is_distance: True for a distance to the base, whose own value is 0; a gate sets the limit, and no adapter is
            "better".
        headline: Sentence at the top of a report, with `{verdict}`, `{adapter}` and `{base}`; empty for none.
        verdicts: `{verdict}` of the headline by better, worse and unclear.
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
    """

    name: str
    measure: Callable[[Evidence], Pair]
    title: str
    better: Literal["higher", "lower"]
    meaning: str
    is_distance: bool = False
    headline: str = ""
    verdicts: tuple[str, str, str] = ("better", "worse", "not clearly different")
    revision: int = 0


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
) -> Callable[[Callable[[Evidence], Pair]], Metric]:
    """Returns a decorator that makes a function a `Metric` of the same name (arguments: see there)."""

    def declare(measure: Callable[[Evidence], Pair]) -> Metric:
        return Metric(measure.__name__, measure, title, better, meaning, is_distance, headline, verdicts, revision)

    return declare


@metric(
    "Likeness to the real image",
    "higher",
    "Similarity of a generated image to the real image with the same caption (cosine of their embeddings, 1 is "
    "identical).",
    headline="With the adapter, images are {verdict} the real ones than the base's: likeness {adapter:.2f} instead of "
    "{base:.2f}.",
    verdicts=("closer to", "further from", "not clearly closer to"),
)
def clip_i_paired(evidence: Evidence) -> Pair:
    """Returns the cosine of a generated image and the real image of the same caption (unpaired means mislead)."""

    def likeness(pair: ImagePair, images: Tensor) -> Tensor:
        if pair.reference is None:
            raise ValueError(f"the request {pair.request.prompt!r} has no reference image")
        return _embed(evidence, images) @ evidence.embedder.embed_images(pair.reference[None])[0]

    return _by_prompt(evidence.reference, likeness)


@metric(
    "Agreement with the prompt",
    "higher",
    "Similarity of a generated image to its prompt without the trigger word (cosine of image and text embeddings).",
)
def clip_t(evidence: Evidence) -> Pair:
    """Returns the cosine of a generated image and its prompt without the trigger, which no embedder knows."""

    def agreement(pair: ImagePair, images: Tensor) -> Tensor:
        return _embed(evidence, images) @ evidence.embedder.embed_texts([pair.request.prompt_without_trigger])[0]

    return _by_prompt(evidence.with_trigger, agreement)


@metric(
    "Drift without the trigger",
    "lower",
    "Change of images whose prompt does not name the concept (1 - cosine to the base's image of the same seed, 0 is "
    "unchanged).",
    is_distance=True,
    headline="Without the trigger it changes the base's images by {adapter:.2f} (0 is unchanged).",
)
def drift(evidence: Evidence) -> Pair:
    """Returns 1 - cosine to the base's image of the same seed, on prompts without the trigger; 0 for the base."""

    def distance(pair: ImagePair, images: Tensor) -> Tensor:
        return 1.0 - (_embed(evidence, images) * _embed(evidence, pair.base)).sum(dim=-1)

    return _from_zero(_by_prompt(evidence.without_trigger, distance))


@metric(
    "Drift in pixels",
    "lower",
    "The same comparison in pixels: root mean square difference as a share of the full range.",
    is_distance=True,
)
def drift_pixels(evidence: Evidence) -> Pair:
    """Returns the root mean square difference to the base's image of the same seed, as a share of the full range."""

    def distance(pair: ImagePair, images: Tensor) -> Tensor:
        difference = (images.double() - pair.base.double()) / 255.0
        return difference.square().mean(dim=(1, 2, 3)).sqrt()

    return _by_prompt(evidence.without_trigger, distance)


@metric(
    "Validation loss",
    "lower",
    "Training loss with fixed noise and time steps, which makes two models comparable.",
)
def validation_loss(evidence: Evidence) -> Pair:
    """Returns the denoising losses on the fixed grid of time steps, one value per real image."""
    return evidence.losses


def _embed(evidence: Evidence, images: Tensor) -> Tensor:
    return evidence.embedder.embed_images(images.float() / 127.5 - 1.0)


def _by_prompt(pairs: tuple[ImagePair, ...], value: Callable[[ImagePair, Tensor], Tensor]) -> Pair:
    import torch

    # Images of one prompt are not independent: the unit of resampling is the prompt, with the mean over its seeds.
    # With a single prompt the seeds are the units.
    base = [value(pair, pair.base) for pair in pairs]
    adapter = [value(pair, pair.adapter) for pair in pairs]
    if len(pairs) == 1:
        return _to_numpy(base[0]), _to_numpy(adapter[0])
    return _to_numpy(torch.stack([v.mean() for v in base])), _to_numpy(torch.stack([v.mean() for v in adapter]))


def _to_numpy(values: Tensor) -> Values:
    return values.double().numpy()


def _from_zero(pair: Pair) -> Pair:
    import numpy as np

    # Rounding makes the cosine of a vector with itself slightly less or more than 1; a distance is never below 0.
    base, adapter = pair
    return np.zeros_like(base), np.maximum(adapter, 0.0)
