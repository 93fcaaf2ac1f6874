"""Plans an evaluation: prompts, seeds and the real images to compare with. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.documents import read_json_object
from lora_engine.errors import DataError
from lora_engine.evaluation.prompts import remove_trigger
from lora_engine.evaluation.spec import EvaluateSettings


@dataclass(frozen=True)
class Request:
    """One prompt and the seeds of its images.

    Attributes:
        prompt: The prompt for the model.
        prompt_without_trigger: The prompt for the embedder, which never saw the trigger.
        seeds: One seed per image; derived from prompt and settings, independent of the other prompts.
        image: The real image with this caption; None for other prompts.
    """

    prompt: str
    prompt_without_trigger: str
    seeds: tuple[int, ...]
    image: ImageEntry | None = None


@dataclass(frozen=True)
class EvaluationPlan:
    """The images that an evaluation generates and compares.

    Attributes:
        folder: The dataset folder of the real images.
        measured_on: `training` if no image was held out, which makes the metrics too optimistic.
        reference: Captions of real images.
        with_trigger: The prompts.
        without_trigger: The prompts without the trigger.
        size: (height, width) in pixels.
        trigger: See `Manifest`.
        class_word: See `Manifest`.
    """

    folder: Path
    measured_on: Literal["heldout", "training"]
    reference: tuple[Request, ...]
    with_trigger: tuple[Request, ...]
    without_trigger: tuple[Request, ...]
    size: tuple[int, int]
    trigger: str | None
    class_word: str | None

    def all_requests(self) -> tuple[Request, ...]:
        """Returns the requests of all three groups; some of them may have the same images."""
        return self.reference + self.with_trigger + self.without_trigger


def make_plan(
    settings: EvaluateSettings,
    dataset: Path,
    *,
    heldout: Path | None,
    prompts: Sequence[str],
    trained_on: Sequence[str] = (),
) -> EvaluationPlan:
    """Plans the requests; the same settings and inputs give the same plan.

    Args:
        settings: See `EvaluateSettings`.
        dataset: The training dataset of the adapter, with its held-out split.
        heldout: Another dataset with held-out images; None takes the split of `dataset`.
        prompts: Prompts besides the captions of the real images; empty takes these captions.
        trained_on: Digests of the images that the adapter was trained on.

    Raises:
        DataError: No image to compare with, images of several sizes, or a held-out image that was trained on.
    """
    manifest = Manifest.load(dataset)
    folder, measured_on, images = _choose(manifest, dataset, heldout, settings.max_pictures, frozenset(trained_on))
    trigger, class_word = manifest.trigger, manifest.class_word

    def request(prompt: str, image: ImageEntry | None = None) -> Request:
        bare = remove_trigger(prompt, trigger, class_word)
        seeds = tuple(derive_evaluation_seed(settings.seed, "picture", k, prompt) for k in range(settings.seeds))
        return Request(prompt, bare, seeds, image)

    reference = tuple(request(image.caption, image) for image in images)
    with_trigger = tuple(request(text) for text in dict.fromkeys(prompts or [image.caption for image in images]))
    without_trigger = tuple(request(text) for text in dict.fromkeys(r.prompt_without_trigger for r in with_trigger))
    return EvaluationPlan(
        folder, measured_on, reference, with_trigger, without_trigger, _size(images), trigger, class_word
    )


def read_trained_on(adapter: Path) -> tuple[str, ...]:
    """Returns the digests of an adapter's training images from the `training.json` beside it; empty without one.

    Raises:
        DataError: The file exists and cannot be read.
    """
    path = (adapter if adapter.is_dir() else adapter.parent) / "training.json"
    if not path.exists():
        return ()
    digests = read_json_object(path, DataError, remedy="train again").get("trained_on", [])
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
        raise DataError("'trained_on' is not a list of digests", where=str(path), remedy="train again")
    return tuple(digests)


def derive_evaluation_seed(*parts: object) -> int:
    """Returns a seed in [0, 2^31) that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4]) & 0x7FFFFFFF


def _choose(
    manifest: Manifest, dataset: Path, heldout: Path | None, limit: int, trained_on: frozenset[str]
) -> tuple[Path, Literal["heldout", "training"], list[ImageEntry]]:
    folder, source = dataset, manifest
    if heldout is not None:
        folder, source = heldout, Manifest.load(heldout)
    images = source.of_split("heldout") or (source.of_split("train") if heldout is not None else ())
    if not images:
        if heldout is not None or not manifest.of_split("train"):
            raise DataError("the dataset has no image to compare with", where=str(folder))
        return folder, "training", _first(manifest.of_split("train"), limit)
    if seen := [image.source for image in images if image.sha256 in trained_on]:
        raise DataError(
            f"{len(seen)} of {len(images)} held-out images were trained on, first {seen[0]!r}",
            where=str(folder),
            remedy="hold out other images, or train again without these",
        )
    return folder, "heldout", _first(images, limit)


def _first(images: Sequence[ImageEntry], limit: int) -> list[ImageEntry]:
    return sorted(images, key=lambda image: image.sha256)[:limit]


def _size(images: Sequence[ImageEntry]) -> tuple[int, int]:
    sizes = {(image.height, image.width) for image in images}
    if len(sizes) > 1:
        raise DataError(
            f"the images to compare with have {len(sizes)} sizes, such as {min(sizes)} and {max(sizes)}",
            allowed="one (height, width)",
            remedy="run preprocess first and evaluate on its output",
        )
    return sizes.pop()
