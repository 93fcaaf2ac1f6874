"""Class images for prior preservation: read from a dataset, or drawn by the base."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from lora_engine.bases.base import BaseModel
from lora_engine.bases.source import TINY, BaseSource
from lora_engine.data.class_images import DRAWN, GIVEN, USUAL, find_odd, read_class_image
from lora_engine.data.images import open_image
from lora_engine.data.manifest import Manifest, Split
from lora_engine.data.pixels import write_png
from lora_engine.embedding.class_likeness import measure_likeness
from lora_engine.embedding.embedder import load_embedder
from lora_engine.embedding.embedder_source import EMBEDDER_TYPES, EmbedderSource, resolve_embedder
from lora_engine.errors import DataError, SettingsError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from lora_engine.inference.generate import generate
from lora_engine.seeds import derive_seed
from lora_engine.training.examples import Example, ImageSize
from lora_engine.training.spec import Prior

_BATCH = 8
_log = logging.getLogger(__name__)


def prior_prompts(prior: Prior, class_word: str | None) -> tuple[str, ...]:
    """Returns the prompts of the class images.

    Raises:
        SettingsError: There is neither a prompt nor a class word.
    """
    if prior.prompt:
        return (prior.prompt,) if isinstance(prior.prompt, str) else prior.prompt
    if not class_word:
        raise SettingsError(
            "dreambooth has neither a class word nor a prompt for class images",
            remedy="set class_word in the caption step, set prior.prompt, or use method finetune",
        )
    article = "an" if class_word[0].lower() in "aeiou" else "a"
    return (f"{article} {class_word}",)


def read_class_images(
    folder: Path,
    prior: Prior,
    class_word: str | None,
    sizes: Collection[ImageSize],
    split: Split = "train",
    clip: EmbedderSource | None = None,
) -> tuple[Example, ...]:
    """Returns images of a dataset as class images; uncaptioned ones get the prompts in turn. Warns of useless ones.

    Args:
        folder: A dataset.
        prior: Prompts and batching.
        class_word: Class word of the user's images; None takes the dataset's.
        sizes: Sizes of the user's images.
        split: The images to take: `class` for those beside the user's images.
        clip: An embedder of images and texts, which compares the images with their captions; None compares nothing.

    Raises:
        DataError: The dataset has no images, or joint batches would have sizes without class images.
        SettingsError: An image has no caption, and there is neither a prompt nor a class word.
    """
    manifest = Manifest.load(folder)
    images = manifest.of_split(split)
    if not images:
        raise DataError(
            "class_dataset has no training images", where=str(folder), remedy="add images, or remove class_dataset"
        )
    uncaptioned = [image for image in images if not image.caption.strip()]
    prompts = prior_prompts(prior, class_word or manifest.class_word) if uncaptioned else ()
    prompts_in_turn = cycle(prompts)
    examples = tuple(
        Example(
            folder / image.file,
            sha256_file(folder / image.file),
            image.caption if image.caption.strip() else next(prompts_in_turn),
            (image.height, image.width),
            framing=image.framing,
        )
        for image in images
    )
    missing = sorted(set(sizes) - {example.size for example in examples})
    if missing and prior.batches == "joint":
        height, width = missing[0]
        raise DataError(
            f"{len(missing)} training sizes have no class images, first {height} x {width}",
            where=str(folder),
            remedy="preprocess both datasets alike, or set prior.batches to alternating",
        )
    _warn_of_odd([image.source for image in images], examples, GIVEN, clip)
    return examples


def find_clip(embedder: Path | None, source: BaseSource) -> EmbedderSource | None:
    """Returns an embedder of images and texts that a training has at hand: its own one, or that of the embedded base.

    Args:
        embedder: The folder of `method.identity`, which may be of any model; None without one.
        source: The base.
    """
    if embedder is None and source.name != TINY:
        return None
    try:
        found = resolve_embedder(TINY if embedder is None else str(embedder))
    except SettingsError:
        return None  # a model of images that is no embedder of ours
    return found if EMBEDDER_TYPES[found.model_type].reads_text else None


def _warn_of_odd(names: Sequence[str], examples: Sequence[Example], fix: str, clip: EmbedderSource | None) -> None:
    images = [read_class_image(name, open_image(image.file)) for name, image in zip(names, examples, strict=True)]
    likeness = None
    if clip is not None:
        files = [example.file for example in examples]
        likeness = measure_likeness(load_embedder(clip), files, [example.caption for example in examples])
    for problem in find_odd(images, fix, likeness, tolerated=USUAL):
        _log.warning("%s", problem)


@dataclass(frozen=True)
class ClassImages:
    """Draws class images into a folder; existing ones are reused.

    Attributes:
        base: Base with nothing attached.
        prior: Sampling settings.
        prompts: See `prior_prompts`; used in turn.
        folder: Folder of the images; subfolders are named by a digest of everything that they depend on.
        seed: Seed of the run.
        check: Called while drawing with the number of images so far; may raise to stop.
        clip: See `read_class_images`.
    """

    base: BaseModel
    prior: Prior
    prompts: tuple[str, ...]
    folder: Path
    seed: int
    check: Callable[[int], None]
    clip: EmbedderSource | None = None

    def draw(self, sizes: Sequence[ImageSize]) -> tuple[Example, ...]:
        """Draws class images in the sizes of the user's images: in proportion, at least one per size.

        Warns of images that preserve nothing.
        """
        examples: list[Example] = []
        for size, occurrences in sorted(Counter(sizes).items()):
            count = max(1, round(self.prior.count * occurrences / len(sizes)))
            for first in range(0, count, _BATCH):
                self.check(len(examples))
                numbers = range(first, min(first + _BATCH, count))
                prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
                files = self._draw_batch(size, numbers, prompts)
                examples += [
                    Example(file, sha256_file(file), prompt, size) for file, prompt in zip(files, prompts, strict=True)
                ]
        self.check(len(examples))
        _warn_of_odd([f"number {number}" for number in range(len(examples))], examples, DRAWN, self.clip)
        return tuple(examples)

    def _draw_batch(self, size: ImageSize, numbers: range, prompts: list[str]) -> list[Path]:
        # An incomplete batch is drawn again as a whole, so that an interrupted run gets the same bytes.
        key = {
            "base": self.base.fingerprint,
            "device": self.base.device.type,
            "dtype": str(self.base.dtype) if self.base.quantization == "none" else self.base.quantization,
            **self.base.options.key(),
            "prompts": prompts,
            "size": list(size),
            "steps": self.prior.steps,
            "guidance": self.prior.guidance,
            "seed": self.seed,
            "numbers": [numbers.start, numbers.stop],
        }
        folder = self.folder / sha256_bytes(canonical_json(key))[:32]
        files = [folder / f"{number:05d}.png" for number in numbers]
        if all(file.is_file() for file in files):
            return files
        images = generate(
            self.base,
            prompts,
            seeds=[derive_seed(self.seed, "class picture", *size, number) for number in numbers],
            steps=self.prior.steps,
            guidance=self.prior.guidance,
            height=size[0],
            width=size[1],
            batch=_BATCH,
        )
        for file, image in zip(files, images, strict=True):
            write_png(file, image)
        return files
