"""Defines the input of the metrics: images and losses of every compared model. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from lora_engine.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.embedding.embedder import Embedder
    from lora_engine.evaluation.judge import Judgement
    from lora_engine.evaluation.plan import Request
    from lora_engine.evaluation.statistics import Values
    from lora_engine.evaluation.subject import SubjectImages

BASE, CANDIDATE, PRODUCTION, COMBINED = "base", "candidate", "production", "combined"
"""Roles of the compared models; `combined` is the candidate together with a second adapter. Other versions have their
reference as role, such as `zorb@3`."""

MIN_GROUPS = 6
"""Least number of groups for an interval and a verdict: below, no exact test can reach 5 %."""
COVERAGE_GROUPS = 16
"""Least number of groups from which the interval covers at least 94 %, so that reports may state its coverage."""
LEAST_ANSWERED = 0.5
"""Probability of all allowed answers together below which a judge does not answer as asked."""

_Model = TypeVar("_Model", bound="Embedder | Judgement")
RequestSet = Literal["reference", "with_trigger", "without_trigger", "of_class", "unrelated"]
"""Captions of real images; the prompts; the prompts without the trigger; prompts of the class word; unrelated ones."""


@dataclass(frozen=True)
class ImageSet:
    """The images of one request by every model, with the same seeds.

    Attributes:
        request: The request.
        images: Role -> uint8 [seeds, 3, height, width].
        reference: The real image of the request, float32 [3, height, width] in [-1, 1]; None for other prompts.
        mask: Its mask, float32 [1, height, width] in [0, 1]; None gives every pixel full weight.
    """

    request: Request
    images: Mapping[str, Tensor]
    reference: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Denoising losses on real images, with the same noise and timesteps for every model.

    Attributes:
        values: Role -> float64 [images, timesteps]; a mask weights the pixels of its image.
        timesteps: The timesteps, ascending: from little to much noise.
        groups: Group of each image; see `Measured`.
    """

    values: Mapping[str, Values]
    timesteps: tuple[int, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class RealImage:
    """A real image: one that the candidate was trained on.

    Attributes:
        sha256: Digest of the original file.
        source: Name in the user's folder.
        path: The file in the dataset.
        group: Group of kin images.
    """

    sha256: str
    source: str
    path: Path
    group: str


@dataclass(frozen=True)
class Evidence:
    """The input of the metrics.

    Attributes:
        roles: The models: `base`, `candidate`, then the others in the order of the settings.
        sets: The images by set of requests.
        heldout: Losses on the held-out images, in the order of `reference`.
        training: Losses on training images; None if they were not measured.
        trained_on: The training images, for metrics of memorization.
        embedder: Embeds images and texts; None leaves out the metrics that need it.
        image_embedder: Embeds images only, such as a DINOv2; None leaves out the metrics that need it.
        face_embedder: Embeds faces; None leaves out the metrics of identity.
        judgement: Answers of the judge; None leaves out its metrics.
        masked_likeness: True embeds real images with gray outside of their masks.
        seed: Seed of the evaluation, for metrics that draw.
    """

    roles: tuple[str, ...]
    sets: Mapping[RequestSet, tuple[ImageSet, ...]]
    heldout: Losses
    training: Losses | None = None
    trained_on: tuple[RealImage, ...] = ()
    embedder: Embedder | None = None
    image_embedder: Embedder | None = None
    face_embedder: Embedder | None = None
    judgement: Judgement | None = None
    masked_likeness: bool = False
    seed: int = 0
    used_embedders: set[str] = field(default_factory=set, repr=False, compare=False)
    """Fingerprints of the embedders, and of the judge, that were used since it was cleared."""
    _vectors: dict[tuple[str, Request, str], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def reference(self) -> tuple[ImageSet, ...]:
        """Returns the images of the captions of real images."""
        return self.sets["reference"]

    @property
    def with_trigger(self) -> tuple[ImageSet, ...]:
        """Returns the images of the prompts."""
        return self.sets["with_trigger"]

    @property
    def without_trigger(self) -> tuple[ImageSet, ...]:
        """Returns the images of the prompts without the trigger."""
        return self.sets["without_trigger"]

    @cached_property
    def subject(self) -> SubjectImages:
        """The training images as vectors, hashes and faces."""
        from lora_engine.evaluation.subject import SubjectImages

        return SubjectImages(self.trained_on)

    def mean_losses(self) -> tuple[dict[str, Values], dict[str, Values]]:
        """Returns the losses by role, averaged over the timesteps: of held-out images [n] and of training images [m].

        Raises:
            ValueError: The losses of training images were not measured.
        """
        if self.training is None:
            raise ValueError("the losses of the training images were not measured")
        heldout, training = (
            {role: values.mean(axis=1) for role, values in losses.values.items()}
            for losses in (self.heldout, self.training)
        )
        return heldout, training

    def require_embedder(self) -> Embedder:
        """Returns the embedder of images and texts; metrics that call this declare `needs_embedder`.

        Raises:
            SettingsError: There is none.
        """
        return self._required(self.embedder)

    def require_image_embedder(self) -> Embedder:
        """Returns the embedder of images only; metrics that call this declare `needs_image_embedder`.

        Raises:
            SettingsError: There is none.
        """
        return self._required(self.image_embedder)

    def require_face_embedder(self) -> Embedder:
        """Returns the embedder of faces; metrics that call this declare `needs_faces`.

        Raises:
            SettingsError: There is none.
        """
        return self._required(self.face_embedder)

    def require_judgement(self) -> Judgement:
        """Returns the answers of the judge; metrics that call this declare `needs_judge`.

        Raises:
            SettingsError: There are none.
        """
        return self._required(self.judgement)

    def embed(self, images: ImageSet, role: str, embedder: Embedder) -> Tensor:
        """Embeds the images of a model, or the real image for the role `reference`: float32 [n, d] of length 1.

        Each is embedded once. A real image is embedded as `masked_likeness` says.
        """
        self.used_embedders.add(embedder.fingerprint)
        key = (embedder.fingerprint, images.request, role)
        if key not in self._vectors:
            self._vectors[key] = embedder.embed_images(_pixels(images, role, masked=self.masked_likeness))
        return self._vectors[key]

    def _required(self, model: _Model | None) -> _Model:
        if model is None:
            raise SettingsError("the metric needs a model, and none was loaded", remedy="declare it as `unmet`")
        self.used_embedders.add(model.fingerprint)
        return model


@dataclass(frozen=True)
class Measured:
    """The values of a metric by model.

    Attributes:
        values: Role -> float64 [units]; the same units in the same order for every role, all finite.
        groups: Group of each unit. Units of a group depend on one another (kin images, equal drawings), so n counts
            groups.
    """

    values: Mapping[str, Values]
    groups: tuple[str, ...]


def measure_sets(
    evidence: Evidence,
    sets: Iterable[ImageSet],
    value: Callable[[ImageSet, str], Tensor],
    *,
    roles: Iterable[str] | None = None,
) -> Measured:
    """Measures image sets; a set is a unit, with the mean over its seeds.

    Args:
        evidence: The evidence.
        sets: The image sets; at least one.
        value: Takes an image set and a role; returns one value per seed, [seeds].
        roles: The models; None means all.
    """
    import numpy as np

    sets = tuple(sets)
    values = {
        role: np.array([float(value(images, role).double().mean()) for images in sets])
        for role in (evidence.roles if roles is None else roles)
    }
    return Measured(values, tuple(images.request.group for images in sets))


def _pixels(images: ImageSet, role: str, *, masked: bool) -> Tensor:
    if role != "reference":
        return images.images[role].float() / 127.5 - 1.0
    if images.reference is None:
        raise ValueError(f"the request {images.request.prompt!r} has no reference image")
    reference = images.reference[None]
    # Gray is 0 in [-1, 1].
    return reference if images.mask is None or not masked else reference * images.mask
