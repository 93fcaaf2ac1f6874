"""Which pictures a run works with: those to train on, those held out, and those of the class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError, SettingsError
from lora_engine.training.captions import Rewriter
from lora_engine.training.examples import Example, read_examples
from lora_engine.training.prior import ClassImages, prior_prompts, read_class_images
from lora_engine.training.spec import TrainSettings


@dataclass(frozen=True)
class TrainingImages:
    """The pictures of a run.

    Attributes:
        examples: To train on.
        classes: What the base must go on to know; empty without prior preservation.
        heldout: For the validation loss; empty where none is asked for.
    """

    examples: tuple[Example, ...]
    classes: tuple[Example, ...]
    heldout: tuple[Example, ...]

    @property
    def groups(self) -> tuple[tuple[Example, ...], ...]:
        """The three of them."""
        return self.examples, self.classes, self.heldout


def read_images(
    settings: TrainSettings, dataset: Path, manifest: Manifest
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The pictures to train on and those held out, of a dataset.

    Raises:
        DataError: There are none to train on.
        SettingsError: A validation is asked for, and none are held out.
    """
    examples = read_examples(dataset, manifest, "train")
    if not examples:
        raise DataError("there are no pictures to train on", where=str(dataset), remedy="lower heldout, or add some")
    if not settings.validate_every:
        return examples, ()
    heldout = read_examples(dataset, manifest, "heldout")
    if not heldout:
        raise SettingsError(
            f"validate_every is {settings.validate_every}, and the dataset holds no pictures out",
            remedy="set heldout above 0 in the ingest step, or validate_every to 0",
        )
    # A validation must compare: nothing is drawn for its captions.
    words = Rewriter(settings.captions)
    return examples, tuple(replace(example, caption=words.rewrite(example.caption)) for example in heldout)


def class_images(
    settings: TrainSettings,
    base: BaseModel,
    manifest: Manifest,
    examples: Sequence[Example],
    *,
    given: Path | None,
    work: Path,
    told: Callable[[int], None],
) -> tuple[Example, ...]:
    """The class pictures of prior preservation: given ones, or drawn by the base; none where it is not asked for.

    Args:
        settings: Of the run.
        base: Without the adapter.
        manifest: Names the class word.
        examples: The person's pictures, in whose sizes the class's are.
        given: A folder with a manifest; None lets the base draw.
        work: Where drawn ones are kept.
        told: Takes the number of pictures that are drawn; may raise to stop.
    """
    prior = settings.class_images
    if prior is None:
        return ()
    sizes = [example.size for example in examples]
    if given is not None:
        return read_class_images(given, prior, manifest.class_word, sizes)
    prompts = prior_prompts(prior, manifest.class_word)
    return ClassImages(base, prior, prompts, work, settings.seed, told).draw(sizes)
