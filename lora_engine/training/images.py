"""Selects the images of a run: training, held-out and class images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.embedding.embedder_source import EmbedderSource
from lora_engine.errors import DataError, SettingsError
from lora_engine.training.captions import Rewriter
from lora_engine.training.examples import Example, read_examples
from lora_engine.training.prior import ClassImages, prior_prompts, read_class_images
from lora_engine.training.spec import TrainSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run.

    Attributes:
        examples: Training images.
        classes: Class images; empty without prior preservation.
        heldout: Images of the validation loss; empty without validation.
    """

    examples: tuple[Example, ...]
    classes: tuple[Example, ...]
    heldout: tuple[Example, ...]

    @property
    def groups(self) -> tuple[tuple[Example, ...], ...]:
        """Training, class and held-out images."""
        return self.examples, self.classes, self.heldout


def read_images(
    settings: TrainSettings, dataset: Path, manifest: Manifest
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Returns the training images and the held-out ones of a dataset.

    Raises:
        DataError: There are no training images.
        SettingsError: Validation is enabled, and no images are held out.
    """
    examples = read_examples(dataset, manifest, "train")
    if not examples:
        raise DataError("the dataset has no training images", where=str(dataset), remedy="lower heldout, or add images")
    if not settings.validate_every:
        return examples, ()
    heldout = read_examples(dataset, manifest, "heldout")
    if not heldout:
        raise SettingsError(
            f"validate_every is {settings.validate_every}, but the dataset has no held-out images",
            remedy="set heldout above 0 in the ingest step, or validate_every to 0",
        )
    # No draws, so that validations are comparable.
    rewriter = Rewriter(settings.captions)
    return examples, tuple(replace(example, caption=rewriter.rewrite(example.caption)) for example in heldout)


def class_images(
    settings: TrainSettings,
    base: BaseModel,
    manifest: Manifest,
    examples: Sequence[Example],
    *,
    dataset: Path,
    class_dataset: Path | None,
    work: Path,
    on_drawn: Callable[[int], None],
    clip: EmbedderSource | None = None,
) -> tuple[Example, ...]:
    """Returns the class images of prior preservation; empty if it is disabled.

    Args:
        settings: Settings of the run.
        base: Base without the adapter.
        manifest: Manifest with the class word.
        examples: The user's images, whose sizes the class images share.
        dataset: The folder of the manifest; its class images are used if there is no `class_dataset`.
        class_dataset: A folder with another manifest. If neither has class images, the base draws them.
        work: Folder of drawn images.
        on_drawn: Called with the number of images drawn so far; may raise to stop.
        clip: See `read_class_images`.
    """
    prior, own = settings.class_images, len(manifest.of_split("class"))
    if own and (prior is None or class_dataset is not None):
        reason = f"method {settings.method.name!r} uses none" if prior is None else "class_dataset is set"
        _log.warning("the %d class images of the dataset are not used: %s", own, reason)
    if prior is None:
        return ()
    sizes = [example.size for example in examples]
    if class_dataset is not None:
        return read_class_images(class_dataset, prior, manifest.class_word, sizes, clip=clip)
    if own:
        return read_class_images(dataset, prior, manifest.class_word, sizes, "class", clip)
    prompts = prior_prompts(prior, manifest.class_word)
    return ClassImages(base, prior, prompts, work, settings.seed, on_drawn, clip).draw(sizes)
