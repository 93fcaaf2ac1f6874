"""Selects the images that score the candidates of a training, so that the evaluation has others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_engine.data.duplicates import group_files
from lora_engine.data.manifest import ImageEntry, Manifest, Split
from lora_engine.errors import SettingsError
from lora_engine.training.captions import Rewriter
from lora_engine.training.examples import Example, read_examples
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.choosing import ChoiceScore

SPLIT_FROM = 8
"""Independent groups of held-out images from which on half of them is left for the evaluation."""
VALIDATE_FROM = 6
"""Held-out images from which on `by: auto` scores by their loss."""
_MAX_TRAINING = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChoiceImages:
    """The images that score candidates.

    Attributes:
        by: Score of a step.
        units: Groups of examples that show the same; the loss of a unit is the mean of its images.
        heldout: Digests of the held-out images among them, as in the manifest.
        trained: Training images that they are compared with; empty without a limit of what is memorized.
    """

    by: ChoiceScore
    units: tuple[tuple[Example, ...], ...]
    heldout: tuple[str, ...]
    trained: tuple[Example, ...] = ()

    @property
    def examples(self) -> tuple[Example, ...]:
        """All images, unit by unit."""
        return tuple(example for unit in self.units for example in unit)

    def unit_losses(self, losses: Sequence[float]) -> list[float]:
        """Returns the mean loss of each unit, of the losses of `examples`."""
        by_unit, rest = [], list(losses)
        for unit in self.units:
            by_unit.append(sum(rest[: len(unit)]) / len(unit))
            rest = rest[len(unit) :]
        return by_unit


def choice_images(settings: TrainSettings, dataset: Path, manifest: Manifest) -> ChoiceImages:
    """Returns the images that score candidates: held-out ones, or for `dvar` training images.

    From 8 independent groups of held-out images on, every second one in the order of their smallest digests is taken;
    the others remain for the evaluation.

    Args:
        settings: Settings with `best_checkpoint`.
        dataset: The folder of the manifest.
        manifest: The dataset.

    Raises:
        SettingsError: The score or the limit needs held-out images, and there are none or too few.
    """
    heldout, wanted = manifest.of_split("heldout"), settings.best_checkpoint
    by: ChoiceScore | Literal["auto"] = wanted.by if wanted is not None else "auto"
    if by == "validation_loss" and not heldout:
        raise SettingsError(
            "best_checkpoint.by is 'validation_loss', but the dataset has no held-out images",
            where="best_checkpoint.by",
            remedy="set heldout above 0 in the ingest step, or by to dvar",
        )
    if by == "auto":
        by = "validation_loss" if len(heldout) >= VALIDATE_FROM else "dvar"
        if by == "dvar" and heldout:
            _log.warning(
                "%d held-out images are too few to choose a step by (%d are needed): the loss on the training images "
                "decides when to stop",
                len(heldout),
                VALIDATE_FROM,
            )
    limit = wanted.max_memorized if wanted is not None else None
    if by == "dvar" and limit is not None:
        raise SettingsError(
            f"best_checkpoint.max_memorized is {limit:g}, but the dataset has {len(heldout)} held-out images; "
            f"{VALIDATE_FROM} are needed",
            where="best_checkpoint.max_memorized",
            remedy="hold out more images in the ingest step, or leave max_memorized out",
        )
    trained = _training_images(settings, dataset, manifest) if by == "dvar" or limit is not None else ()
    if by == "dvar":
        return ChoiceImages(by, tuple((example,) for example in trained), ())
    examples, groups = _read(settings, dataset, manifest, "heldout"), group_kin(dataset, heldout)
    chosen = groups[::2] if len(groups) >= SPLIT_FROM else groups
    units = tuple(tuple(examples[image.sha256] for image in group) for group in chosen)
    return ChoiceImages(by, units, tuple(sorted(image.sha256 for group in chosen for image in group)), trained)


def _training_images(settings: TrainSettings, dataset: Path, manifest: Manifest) -> tuple[Example, ...]:
    return tuple(example for _, example in sorted(_read(settings, dataset, manifest, "train").items())[:_MAX_TRAINING])


def group_kin(dataset: Path, images: Sequence[ImageEntry]) -> list[list[ImageEntry]]:
    """Returns groups of images that show the same, in the order of their smallest digests; sorted within."""
    groups = [[images[index] for index in group] for group in group_files([dataset / image.file for image in images])]
    return sorted((sorted(group, key=_digest) for group in groups), key=lambda group: _digest(group[0]))


def _digest(image: ImageEntry) -> str:
    return image.sha256


def _read(settings: TrainSettings, dataset: Path, manifest: Manifest, split: Split) -> dict[str, Example]:
    """Returns the examples of a split by digest, with captions that draw nothing."""
    rewriter = Rewriter(settings.captions)
    return {
        image.sha256: replace(example, caption=rewriter.rewrite(example.caption))
        for image, example in zip(manifest.of_split(split), read_examples(dataset, manifest, split), strict=True)
    }
