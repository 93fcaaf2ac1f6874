"""Images with captions as the loop sees them: latents and text embeddings, cached by content, never by position."""

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
from lora_engine.data.pixels import read_mask, read_pixels
from lora_engine.errors import DataError
from lora_engine.files import sha256_file
from lora_engine.inference.syntax import parse_weights
from lora_engine.training.augmentations import PLAIN, Augmentation, augmentations_of
from lora_engine.training.cache import TensorCache
from lora_engine.training.captions import Rewriter
from lora_engine.training.specs.captions import Captions

Size = tuple[int, int]
Conditioner = Callable[[Sequence[str], Size], Conditioning]


@dataclass(frozen=True)
class Example:
    """One picture to train on.

    Attributes:
        file: Its pixels.
        digest: SHA-256 of that file.
        caption: What it is trained with.
        size: (height, width) in pixels.
        mask: A file that says where the picture counts; None where it counts everywhere.
        repeats: How often it comes up for once of an example with 1.
        look: What is done to its pixels before they are encoded.
    """

    file: Path
    digest: str
    caption: str
    size: Size
    mask: Path | None = None
    repeats: int = 1
    augmentation: Augmentation = PLAIN

    def identity(self) -> list[str | int]:
        """All that a run depends on of it, as JSON values."""
        found: list[str | int] = [self.digest, self.caption, self.repeats]
        return found if self.mask is None else [*found, sha256_file(self.mask)]

    def pixels(self) -> Tensor:
        """float32 [3, height, width] in [-1, 1], in its look."""
        return self.augmentation.apply(read_pixels(self.file))

    def mask_pixels(self) -> Tensor | None:
        """float32 [1, height, width] in [0, 1], mirrored where the picture is; None where there is no mask."""
        return None if self.mask is None else self.augmentation.mirror(read_mask(self.mask))


def read_examples(folder: Path, manifest: Manifest, split: Split) -> tuple[Example, ...]:
    """The examples of one split of a dataset.

    Raises:
        DataError: A picture without a caption.
    """
    pictures = manifest.of_split(split)
    bare = [picture.source for picture in pictures if not picture.caption.strip()]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(pictures)} pictures have no caption, first {', '.join(map(repr, bare[:3]))}",
            where=str(folder),
            remedy="put a caption step before training, or a .txt beside each picture",
        )
    return tuple(
        Example(
            folder / picture.file,
            sha256_file(folder / picture.file),
            picture.caption,
            (picture.height, picture.width),
            folder / picture.mask if picture.mask else None,
            picture.repeats,
        )
        for picture in pictures
    )


def text_encoder(base: BaseModel, settings: Captions) -> Conditioner:
    """How captions are encoded: as the base does it, or in several chunks, or with weights; nothing is cached.

    Raises (when it is called):
        SettingsError: The base cannot read chunks or weights, or a weight is not finite.
    """
    if settings.chunks == 1 and not settings.weights:
        return base.encode_text

    def encode(texts: Sequence[str], size: Size) -> Conditioning:
        pieces = [parse_weights(text) if settings.weights else [(text, 1.0)] for text in texts]
        return encode_long(base, pieces, size, chunks=settings.chunks)

    return encode


class Encoder:
    """Latents and conditionings of a base, each made once and kept.

    One picture and one text at a time: what a batch holds beside it could change the last bits.

    Args:
        base: The base, with nothing attached to what encodes for the cache.
        folder: Where the cached tensors lie; runs may share it.
        captions: How captions are read and pictures look.
        seed: Of the run; the looks depend on it.
        budget: Bytes of latents, and again of texts, that are held in memory.
    """

    def __init__(
        self, base: BaseModel, folder: Path, captions: Captions | None = None, seed: int = 0, *, budget: int = 1 << 30
    ) -> None:
        self._base, self._captions = base, captions or Captions()
        self._encode = text_encoder(base, self._captions)
        self._rewriter = Rewriter(self._captions)
        self._looks = augmentations_of(self._captions, seed)
        self._latents = TensorCache(folder / "latents", budget=budget)
        self._texts = TensorCache(folder / "texts", budget=budget)
        self._prepared: set[str] = set()
        self._key = {"base": base.fingerprint, "device": base.device.type, "dtype": str(base.dtype), **_computing()}
        reading = {"chunks": self._captions.chunks, "weights": self._captions.weights}
        self._reading = reading if reading != {"chunks": 1, "weights": False} else {}

    @torch.no_grad()
    def latents(self, example: Example) -> Tensor:
        """float32 [channels, height, width], on the CPU."""

        def make() -> dict[str, Tensor]:
            return {"latents": self._base.encode_images(example.pixels()[None])[0]}

        key = {**self._key, "picture": example.digest, **example.augmentation.key()}
        return self._latents.get(key, make)["latents"]

    @torch.no_grad()
    def conditioning(self, texts: Sequence[str], size: Size) -> Conditioning:
        """One row a text, on the CPU.

        Texts that were prepared are kept in the folder. Others, such as shuffled captions, are encoded when they are
        asked for, and held in memory as long as there is room.
        """
        return Conditioning.cat([Conditioning(self._text(text, size)) for text in texts])

    def prepare(
        self,
        examples: Iterable[Example],
        texts: Iterable[str],
        check: Callable[[], None],
        others: Iterable[Example] = (),
    ) -> None:
        """Makes what the loop will ask for, but for captions that differ from batch to batch.

        Args:
            examples: The person's pictures: their latents in all looks, and captions as they are rewritten.
            texts: Further texts, in every size that occurs.
            check: Called before each; may raise to stop.
            others: Class pictures and held-out ones, whose looks and captions stay as they are.
        """
        more = sorted(set(texts))
        wanted: set[tuple[str, Size]] = set()
        for example in examples:
            for augmentation in self._looks:
                check()
                self.latents(replace(example, augmentation=augmentation))
            own = () if self._rewriter.varies(example.caption) else (self._rewriter.rewrite(example.caption),)
            wanted |= {(text, example.size) for text in (*more, *own)}
        for example in others:
            check()
            self.latents(example)
            wanted |= {(text, example.size) for text in (*more, example.caption)}
        for text, size in sorted(wanted):
            check()
            self._prepared.add(text)
            self.conditioning([text], size)

    def _text(self, text: str, size: Size) -> dict[str, Tensor]:
        def make() -> dict[str, Tensor]:
            return dict(self._encode([text], size).tensors)

        key = {**self._key, **self._reading, "text": text, "size": list(size)}
        return dict(self._texts.get(key, make, keep=text in self._prepared))


def _computing() -> dict[str, object]:
    # What the last bits depend on beside the base and its input. A folder that outlives an upgrade, or that machines
    # share, must not make a run's bytes depend on who filled it.
    return {
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "transformers": metadata.version("transformers"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
