"""Encodes captioned images to latents and text embeddings, cached by content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.long_text import encode_long
from lora_engine.data.manifest import Manifest, Split
from lora_engine.data.part import DatasetPart
from lora_engine.data.pixels import read_mask, read_pixels
from lora_engine.errors import DataError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from lora_engine.framing import Framing
from lora_engine.inference.prompts.emphasis import parse_weights
from lora_engine.parallel import Workers
from lora_engine.training.augmentations import UNCHANGED, Augmentation
from lora_engine.training.cache import TensorCache
from lora_engine.training.specs.captions import Captions
from lora_engine.training.variation import Variation

ImageSize = tuple[int, int]
Conditioner = Callable[[Sequence[str], ImageSize], Conditioning]


@dataclass(frozen=True)
class Example:
    """One training image.

    Attributes:
        file: Image file.
        digest: SHA-256 of that file.
        caption: Caption to train with.
        size: (height, width) in pixels.
        mask: Mask file that weights the loss; None weighs the whole image alike.
        repeats: Number of occurrences per epoch.
        augmentation: Transform of the pixels before they are encoded.
        part: Settings of its dataset among several; None takes those of the training.
        alternatives: Further captions, of which one may be drawn instead.
        framing: The part of the original image that the file shows; None if it is not recorded.
    """

    file: Path
    digest: str
    caption: str
    size: ImageSize
    mask: Path | None = None
    repeats: int = 1
    augmentation: Augmentation = UNCHANGED
    framing: Framing | None = None
    part: DatasetPart | None = None
    alternatives: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption and its alternatives."""
        return (self.caption, *self.alternatives)

    def identity(self) -> list[str | int]:
        """Returns everything of the example that a run depends on, as JSON values."""
        values: list[str | int] = [self.digest, self.caption, self.repeats]
        values += [] if self.mask is None else [sha256_file(self.mask)]
        values += self.alternatives
        recorded = [record for record in (self.framing, self.part) if record is not None]
        return [*values, *(sha256_bytes(canonical_json(record.model_dump())) for record in recorded)]

    def seen(self) -> Framing:
        """Returns the part of the original image that the augmented pixels show; all of the file without a record."""
        framing = self.framing or Framing.whole(self.size)
        return framing.mirrored() if self.augmentation.mirrored else framing

    def pixels(self) -> Tensor:
        """Returns the augmented pixels: float32 [3, height, width] in [-1, 1]."""
        return self.augmentation.apply(read_pixels(self.file))

    def mask_pixels(self) -> Tensor | None:
        """Returns the mask, mirrored like the image: float32 [1, height, width] in [0, 1]; None without one."""
        return None if self.mask is None else self.augmentation.mirror(read_mask(self.mask))


def read_examples(folder: Path, manifest: Manifest, split: Split) -> tuple[Example, ...]:
    """Returns the examples of one split of a dataset.

    Raises:
        DataError: An image has no caption.
    """
    images = manifest.of_split(split)
    uncaptioned = [image.source for image in images if not image.caption.strip()]
    if uncaptioned:
        raise DataError(
            f"{len(uncaptioned)} of {len(images)} images have no caption, first "
            f"{', '.join(map(repr, uncaptioned[:3]))}",
            where=str(folder),
            remedy="add a caption step before training, or a .txt file beside each image",
        )
    return tuple(
        Example(
            folder / image.file,
            sha256_file(folder / image.file),
            image.caption,
            (image.height, image.width),
            folder / image.mask if image.mask else None,
            image.repeats,
            framing=image.framing,
            part=manifest.part_of(image),
            alternatives=image.alternatives or (),
        )
        for image in images
    )


def encode_captions(
    base: BaseModel, conditioner: Conditioner, captions: Sequence[str], examples: Sequence[Example]
) -> Conditioning:
    """Returns the conditioning of images of one size with their captions, on the base's device."""
    encoded = conditioner(captions, examples[0].size).to(base.device)
    return base.with_framings(encoded, [example.seen() for example in examples])


def text_encoder(base: BaseModel, settings: Captions) -> Conditioner:
    """Returns the encoder of captions: the base's own, or one for several chunks or weights. Caches nothing.

    Raises (when called):
        SettingsError: The base cannot read chunks or weights, or a weight is not finite.
    """
    if settings.chunks == 1 and not settings.weights:
        return base.encode_text

    def encode(texts: Sequence[str], size: ImageSize) -> Conditioning:
        pieces = [parse_weights(text) if settings.weights else [(text, 1.0)] for text in texts]
        return encode_long(base, pieces, size, chunks=settings.chunks)

    return encode


class Encoder:
    """Latents and conditionings of a base, encoded once and cached.

    Encodes one image and one text at a time, since other batch rows could change the last bits.

    Args:
        base: The base, with nothing attached to the modules that encode for the cache.
        folder: Folder of the cached tensors; runs may share it.
        captions: Caption reading and augmentation; None is the default.
        seed: Seed of the run, which determines the augmentations.
        budget: Bytes of latents held in memory, and again of texts.
    """

    def __init__(
        self, base: BaseModel, folder: Path, captions: Captions | None = None, seed: int = 0, *, budget: int = 1 << 30
    ) -> None:
        self._base, self._captions = base, captions or Captions()
        self._encode = text_encoder(base, self._captions)
        self._variation = Variation(self._captions, seed)
        self._latents = TensorCache(folder / "latents", budget=budget)
        self._texts = TensorCache(folder / "texts", budget=budget)
        self._prepared: set[str] = set()
        self._key = {"base": base.fingerprint, "device": base.device.type, "dtype": str(base.dtype), **_environment()}
        options = base.options.key()
        self._image_options, self._text_options = (
            {name: options[name] for name in names if name in options} for names in (("vae",), ("clip_skip",))
        )
        reading = {"chunks": self._captions.chunks, "weights": self._captions.weights}
        self._reading = reading if reading != {"chunks": 1, "weights": False} else {}

    @torch.no_grad()
    def latents(self, example: Example, pixels: Tensor | None = None) -> Tensor:
        """Returns the latents: float32 [channels, height, width], on the CPU.

        Args:
            example: The image.
            pixels: Its pixels; None reads them if they are needed.
        """

        def make() -> dict[str, Tensor]:
            values = example.pixels() if pixels is None else pixels
            return {"latents": self._base.encode_images(values[None])[0]}

        return self._latents.get(self._image_key(example), make)["latents"]

    @torch.no_grad()
    def conditioning(self, texts: Sequence[str], size: ImageSize) -> Conditioning:
        """Returns one row per text, on the CPU.

        Prepared texts are cached in the folder. Others, such as shuffled captions, are encoded on demand and cached in
        memory within the budget.
        """
        return Conditioning.cat([Conditioning(self._text(text, size)) for text in texts])

    def prepare(
        self,
        examples: Sequence[Example],
        texts: Iterable[str],
        report: Callable[[int, int], None] = lambda done, total: None,
        unaugmented: Sequence[Example] = (),
    ) -> None:
        """Encodes what the loop will need, except captions that vary from batch to batch.

        Args:
            examples: The user's images: their latents in all augmentations, and their rewritten captions.
            texts: Further texts, encoded in every size that occurs.
            report: Called after each image and text with the number of those done and of all; may raise to stop.
            unaugmented: Class images and held-out ones, which keep their pixels and captions.
        """
        extra_texts = sorted(set(texts))
        pending: set[tuple[str, ImageSize]] = set()
        variation = self._variation
        images = [
            replace(example, augmentation=change)
            for example in examples
            for change in variation.augmentations(example.part)
        ]
        images += unaugmented
        for example in examples:
            rewriter = variation.rewriter(example.part)
            rewritten = [rewriter.rewrite(text) for text in example.captions if not rewriter.varies(text)]
            pending |= {(text, example.size) for text in (*extra_texts, *rewritten)}
        for example in unaugmented:
            pending |= {(text, example.size) for text in (*extra_texts, example.caption)}
        self._prepared |= {text for text, _ in pending}
        total = len(images) + len(pending)
        report(0, total)
        with Workers() as workers:
            for done, (example, pixels) in enumerate(workers.map(self._read_ahead, images), start=1):
                self.latents(example, pixels)
                report(done, total)
        for done, (text, size) in enumerate(sorted(pending), start=len(images) + 1):
            self.conditioning([text], size)
            report(done, total)

    def _read_ahead(self, example: Example) -> tuple[Example, Tensor | None]:
        # Encoders may have state, so only the decoding of images is done in threads.
        return example, None if self._latents.has(self._image_key(example)) else example.pixels()

    def _image_key(self, example: Example) -> dict[str, object]:
        return {**self._key, **self._image_options, "picture": example.digest, **example.augmentation.key()}

    def _text(self, text: str, size: ImageSize) -> dict[str, Tensor]:
        def make() -> dict[str, Tensor]:
            return dict(self._encode([text], size).tensors)

        key = {**self._key, **self._text_options, **self._reading, "text": text, "size": list(size)}
        return dict(self._texts.get(key, make, keep=text in self._prepared))


def _environment() -> dict[str, object]:
    # The last bits depend on these beside the base and its input. A cache shared by machines or kept across upgrades
    # must not change a run's bytes.
    return {
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "transformers": metadata.version("transformers"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
