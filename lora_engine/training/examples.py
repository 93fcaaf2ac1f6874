"""Pictures with captions as the loop sees them: latents and text embeddings, cached by content, never by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.conditioning import Conditioning
from lora_engine.data.manifest import Manifest, Split
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import DataError
from lora_engine.files import sha256_file
from lora_engine.training.cache import TensorCache

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
    """

    file: Path
    digest: str
    caption: str
    size: Size


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
            folder / picture.file, sha256_file(folder / picture.file), picture.caption, (picture.height, picture.width)
        )
        for picture in pictures
    )


class Encoder:
    """Latents and conditionings of a base, each made once and kept.

    One picture and one text at a time: what a batch holds beside it could change the last bits.

    Args:
        base: The base, with nothing attached to it while it encodes for the cache.
        folder: Where the cached tensors lie.
    """

    def __init__(self, base: BaseModel, folder: Path) -> None:
        self._base = base
        self._latents = TensorCache(folder / "latents")
        self._texts = TensorCache(folder / "texts")
        self._key = {"base": base.fingerprint, "device": base.device.type, "dtype": str(base.dtype)}

    @torch.no_grad()
    def latents(self, example: Example) -> Tensor:
        """float32 [channels, height, width], on the CPU."""

        def make() -> dict[str, Tensor]:
            return {"latents": self._base.encode_images(read_pixels(example.file)[None])[0]}

        return self._latents.get({**self._key, "picture": example.digest}, make)["latents"]

    @torch.no_grad()
    def conditioning(self, texts: Sequence[str], size: Size) -> Conditioning:
        """One row a text, on the CPU."""
        return Conditioning.cat([Conditioning(self._text(text, size)) for text in texts])

    def prepare(self, examples: Iterable[Example], texts: Iterable[str], check: Callable[[], None]) -> None:
        """Makes everything that the loop will ask for.

        Args:
            examples: Their latents and captions.
            texts: Further texts, in every size that occurs.
            check: Called before each; may raise to stop.
        """
        chosen = list(examples)
        for example in chosen:
            check()
            self.latents(example)
        wanted = {(example.caption, example.size) for example in chosen}
        wanted |= {(text, example.size) for text in texts for example in chosen}
        for text, size in sorted(wanted):
            check()
            self.conditioning([text], size)

    def _text(self, text: str, size: Size) -> dict[str, Tensor]:
        def make() -> dict[str, Tensor]:
            return dict(self._base.encode_text([text], size).tensors)

        return dict(self._texts.get({**self._key, "text": text, "size": list(size)}, make))
