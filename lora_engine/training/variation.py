"""Chooses how captions and images vary, by the settings of the dataset that an image is from."""

from __future__ import annotations

from lora_engine.data.part import DatasetPart
from lora_engine.training.augmentations import Augmentation, augmentations_of
from lora_engine.training.captions import Rewriter
from lora_engine.training.specs.captions import Captions


class Variation:
    """The caption rewriter and the augmentations of each dataset.

    Args:
        captions: Settings of the training.
        seed: Seed of the run.
    """

    def __init__(self, captions: Captions, seed: int) -> None:
        self._captions, self._seed = captions, seed
        self._by_part: dict[DatasetPart | None, tuple[Rewriter, tuple[Augmentation, ...]]] = {}

    def rewriter(self, part: DatasetPart | None) -> Rewriter:
        """Returns the rewriter of the captions of a dataset; None is one without settings of its own."""
        return self._of(part)[0]

    def augmentations(self, part: DatasetPart | None) -> tuple[Augmentation, ...]:
        """Returns the augmentations of the images of a dataset."""
        return self._of(part)[1]

    def _of(self, part: DatasetPart | None) -> tuple[Rewriter, tuple[Augmentation, ...]]:
        if part not in self._by_part:
            changes = {} if part is None else part.of_captions()
            captions = self._captions.model_copy(update=changes)
            self._by_part[part] = Rewriter(captions), augmentations_of(captions, self._seed)
        return self._by_part[part]
