"""The training images as the metrics see them: embedded, hashed, and their faces; each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from lora_engine.data.duplicates import Print, take_print
from lora_engine.data.faces import find_faces
from lora_engine.data.images import open_image
from lora_engine.data.pixels import read_pixels, to_image
from lora_engine.evaluation.identity import FaceMatch, embed_faces, match_faces

if TYPE_CHECKING:
    from lora_engine.embedding.embedder import Embedder
    from lora_engine.evaluation.evidence import Evidence, ImageSet, RealImage
    from lora_engine.evaluation.plan import Request


@dataclass(frozen=True)
class SubjectImages:
    """The images that the candidate was trained on.

    Args:
        images: The images.
    """

    images: tuple[RealImage, ...]
    _vectors: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _prints: list[Print] = field(default_factory=list, repr=False, compare=False)
    _matches: dict[tuple[Request, str], list[FaceMatch]] = field(default_factory=dict, repr=False, compare=False)

    def embed(self, embedder: Embedder) -> Tensor:
        """Embeds the images: float32 [n, d] of length 1."""
        if embedder.fingerprint not in self._vectors:
            # One by one: images of several sizes do not fit in one tensor.
            vectors = [embedder.embed_images(read_pixels(image.path)[None]) for image in self.images]
            self._vectors[embedder.fingerprint] = torch.cat(vectors)
        return self._vectors[embedder.fingerprint]

    def prints(self) -> Sequence[Print]:
        """Returns the perceptual hashes of the images."""
        if not self._prints:
            self._prints.extend(take_print(open_image(image.path)) for image in self.images)
        return self._prints

    def has_faces(self) -> bool:
        """Returns True if at least one image shows exactly one face."""
        return any(len(find_faces(open_image(image.path))) == 1 for image in self.images)

    def match(self, drawn: ImageSet, role: str, embedder: Embedder) -> list[FaceMatch]:
        """Compares the faces in a model's images with those of the training images."""
        key = f"faces {embedder.fingerprint}"
        if key not in self._vectors:
            self._vectors[key] = embed_faces([open_image(image.path) for image in self.images], embedder.embed_images)
        if (drawn.request, role) not in self._matches:
            images = to_images(drawn.images[role])
            self._matches[drawn.request, role] = match_faces(images, self._vectors[key], embedder.embed_images)
        return self._matches[drawn.request, role]


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Returns uint8 images [n, 3, height, width] as RGB images."""
    return [to_image(image.float() / 127.5 - 1.0) for image in pixels]


def embed_heldout(evidence: Evidence, embedder: Embedder) -> Tensor:
    """Embeds the real images that are compared with: float32 [n, d] of length 1, in the order of `reference`."""
    return torch.cat([evidence.embed(images, "reference", embedder) for images in evidence.reference])
