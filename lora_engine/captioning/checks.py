"""Checks captions against a base's tokenizers, and against their images with CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_engine.bases.source import BaseSource
from lora_engine.building import BUILDING
from lora_engine.data.caption_checks import CaptionFinding
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError
from lora_engine.families.layout import text_encoder_of

MANY_TOKENS = 5
"""Tokens of a trigger from which it is long."""
_NO_LIMIT = 1_000_000
_FEW = 3


class EmbedsBoth(Protocol):
    """The protocol of embedders of images and texts, such as `embedding.embedder.Embedder`."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeds images [n, 3, height, width] in [-1, 1] as vectors of length 1."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as vectors of length 1."""
        ...


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer of a base.

    Attributes:
        name: Its folder in the base.
        tokenizer: The tokenizer.
        limit: Most tokens that its text encoder reads, with those at start and end; None if unknown.
    """

    name: str
    tokenizer: Any
    limit: int | None

    def count(self, text: str) -> int:
        """Returns the number of tokens of a text, with those at start and end."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def pieces(self, word: str) -> list[str]:
        """Returns the tokens of a word."""
        return [str(piece) for piece in self.tokenizer.tokenize(word)]


def load_base_tokenizers(source: BaseSource) -> list[BaseTokenizer]:
    """Loads the tokenizers of a base; no weights.

    Raises:
        BaseModelError: One cannot be read.
    """
    from transformers import AutoTokenizer

    names = sorted({file.partition("/")[0] for file in source.layout.files if file.startswith("tokenizer")})
    tokenizers = []
    for name in names:
        folder = source.folder / name
        try:
            with BUILDING:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise BaseModelError(f"the tokenizer cannot be read ({str(error)[:200]})", where=str(folder)) from error
        config = source.folder / text_encoder_of(name) / "config.json"
        positions = (
            read_json_object(config, BaseModelError).get("max_position_embeddings") if config.is_file() else None
        )
        limits = [int(tokenizer.model_max_length), *([positions] if isinstance(positions, int) else [])]
        limit = min(limits)
        tokenizers.append(BaseTokenizer(name, tokenizer, limit if limit < _NO_LIMIT else None))
    return tokenizers


def check_trigger(trigger: str, tokenizers: Sequence[BaseTokenizer]) -> list[CaptionFinding]:
    """Returns what is wrong with a trigger: a word that the base knows, or one of many tokens."""
    for tokenizer in tokenizers:
        pieces = tokenizer.pieces(trigger)
        unknown = tokenizer.tokenizer.unk_token
        if unknown is not None and unknown in pieces and unknown != tokenizer.tokenizer.eos_token:
            return [
                CaptionFinding(
                    "trigger",
                    f"the trigger {trigger!r} has characters that the base's {tokenizer.name} cannot read",
                    "choose a trigger of Latin letters",
                )
            ]
        if len(pieces) == 1:
            return [
                CaptionFinding(
                    "trigger",
                    f"the trigger {trigger!r} is one token of the base's {tokenizer.name}: a word that it knows",
                    "choose another unless it is a rare word, because its old meaning mixes with the concept",
                )
            ]
        if len(pieces) >= MANY_TOKENS:
            return [
                CaptionFinding(
                    "trigger",
                    f"the trigger {trigger!r} has {len(pieces)} tokens in the base's {tokenizer.name}",
                    "choose a shorter one, which is learned sooner and leaves space in the caption",
                )
            ]
    return []


def check_lengths(captions: Mapping[str, str], tokenizers: Sequence[BaseTokenizer]) -> list[CaptionFinding]:
    """Returns the captions that no text encoder of the base reads whole, with their largest number of tokens."""
    if not tokenizers or any(tokenizer.limit is None for tokenizer in tokenizers):
        return []
    widest = max(tokenizers, key=lambda tokenizer: tokenizer.limit or 0)
    limit = widest.limit or 0
    counts = {name: widest.count(text) for name, text in captions.items()}
    over = tuple(name for name, count in counts.items() if count > limit)
    if not over:
        return []
    longest = max(counts[name] for name in over)
    return [
        CaptionFinding(
            "length",
            f"{len(over)} captions have more than the {limit} tokens that the base reads (up to {longest})",
            "shorten them, put what matters first, or set captions.chunks of the training",
            over,
        )
    ]


def check_match(
    images: Mapping[str, Path], captions: Mapping[str, str], embedder: EmbedsBoth
) -> tuple[list[CaptionFinding], dict[str, float]]:
    """Returns the captions that fit their images less than captions of other images do, and all CLIP scores.

    The comparison with other captions of the same data set needs no threshold, which would differ between models.

    Args:
        images: Name -> file.
        captions: Name -> caption.
        embedder: A CLIP.
    """
    names = [name for name in images if captions.get(name)]
    if not names:
        return [], {}
    seen = torch.cat([embedder.embed_images(_read(images[name])) for name in names])
    scores = (seen @ embedder.embed_texts([captions[name] for name in names]).T).double().numpy()
    own = dict(zip(names, map(float, np.round(np.diag(scores), 4)), strict=True))
    texts = [captions[name] for name in names]
    unlike = []
    for row, name in enumerate(names):
        others = [
            scores[row, column]
            for column, other in enumerate(names)
            if texts[column] != texts[row] and images[other] != images[name]
        ]
        if len(others) >= _FEW and scores[row, row] < float(np.median(others)):
            unlike.append(name)
    if not unlike:
        return [], own
    worst = min(unlike, key=lambda name: own[name])
    row = names.index(worst)
    better = names[
        max((c for c in range(len(names)) if images[names[c]] != images[worst]), key=lambda c: scores[row, c])
    ]
    finding = CaptionFinding(
        "unlike",
        f"{len(unlike)} captions fit their images less than most captions of other images, by CLIP",
        f"check them; {captions[better][:60]!r} of {better} fits {worst} better",
        tuple(unlike),
    )
    return [finding], own


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1.0
