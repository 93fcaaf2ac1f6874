"""Learned words on a base: `attach_embeddings` makes texts that name them read as their vectors.

The text encoders keep every row of their own: a learned word is tokenised to negative numbers, and a layer around the
input embedding puts the vectors there. How words are learned is in `training`; which files keep them, in `formats`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_engine.bases.base import BaseModel
from lora_engine.errors import AdapterError
from lora_engine.formats.embeddings import Embedding


def token_pattern(word: str) -> re.Pattern[str]:
    """Finds a word in a text, whatever its case, where no letter, digit or underscore goes on before or after it."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


class LearnedTokenizer:
    """A tokenizer that knows further words; each stands for as many tokens as it has vectors.

    Numbers of learned tokens are negative (-1, -2, ...), so that no vocabulary has them, and so that encoders that look
    for the greatest number to find the end of a text (CLIP's older configurations do) still find it.

    Args:
        tokenizer: A tokenizer of transformers; left as it is.
        words: Word to its number of vectors, in the order of the vectors.
    """

    def __init__(self, tokenizer: Any, words: Mapping[str, int]) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        names: list[str] = []
        for word, count in words.items():
            mine = [f"<|word:{len(names) + place}|>" for place in range(count)]
            names += mine
            self._patterns.append((token_pattern(word), "".join(mine)))
        self._register(names)
        self._first, self._count = int(self._tokenizer.convert_tokens_to_ids(names[0])), len(names)

    def __call__(self, texts: str | Sequence[str], *arguments: Any, **options: Any) -> Any:
        """As the tokenizer's own, with negative numbers where learned words are."""
        expanded = self._expand(texts) if isinstance(texts, str) else [self._expand(text) for text in texts]
        found = self._tokenizer(expanded, *arguments, **options)
        found["input_ids"] = self._number(found["input_ids"])
        return found

    def __getattr__(self, name: str) -> Any:
        # Only for what this class lacks. While it is being copied it lacks even the tokenizer.
        if name.startswith("__") or name == "_tokenizer":
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def _register(self, names: Sequence[str]) -> None:
        from tokenizers import AddedToken

        self._tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])

    def _expand(self, text: str) -> str:
        for pattern, tokens in self._patterns:
            text = pattern.sub(lambda _, tokens=tokens: tokens, text)  # type: ignore[misc]
        return text

    def _number(self, ids: Any) -> Any:
        if isinstance(ids, Tensor):
            return torch.where((ids >= self._first) & (ids < self._first + self._count), self._first - 1 - ids, ids)
        if isinstance(ids, list):
            return [self._number(one) for one in ids]
        return self._first - 1 - ids if self._first <= ids < self._first + self._count else ids


class LearnedEmbedding(nn.Module):
    """An input embedding that gives learned vectors for negative numbers, and its own rows for all others.

    Args:
        base: The layer that was there.
        vectors: [n, width] each, in the order of their numbers.
    """

    def __init__(self, base: nn.Module, vectors: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.base = base
        self.vectors = nn.ParameterList(vectors)

    @property
    def weight(self) -> Tensor:
        """The rows of the layer that was there."""
        rows: Tensor = self.base.weight  # type: ignore[assignment]
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers [n, length] -> [n, length, width]."""
        plain: Tensor = self.base(ids.clamp(min=0))
        learned = torch.cat(list(self.vectors)).to(plain.dtype)
        return torch.where((ids < 0)[..., None], learned[(-1 - ids).clamp(min=0)], plain)


class EmbeddingAttachment:
    """Learned words on a base, until `detach`. Made by `attach_embeddings`; a context manager that detaches at its end.

    Detach adapters that were attached later first.
    """

    def __init__(self, base: BaseModel, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self._base, self._parameters = base, parameters
        self._layers: dict[str, LearnedEmbedding] = {}
        self._tokenizers: dict[str, Any] = {}
        for part in sorted({part for vectors in parameters.values() for part in vectors}):
            mine = {word: vectors[part] for word, vectors in parameters.items() if part in vectors}
            self._put(part, mine)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`words/<word>/<text encoder>` and the vectors."""
        for word, vectors in self._parameters.items():
            for part, value in vectors.items():
                yield f"words/{word}/{part}", value

    def embeddings(self) -> tuple[Embedding, ...]:
        """The words as they are now: copies in float32 on the CPU."""
        return tuple(
            Embedding(word, {part: value.detach().cpu().clone() for part, value in vectors.items()})
            for word, vectors in self._parameters.items()
        )

    def detach(self) -> None:
        """Puts layers and tokenizers back. A second call does nothing."""
        for part, layer in self._layers.items():
            encoder: Any = self._base.modules[part]
            encoder.set_input_embeddings(layer.base)
            setattr(self._base, _tokenizer_of(part), self._tokenizers[part])
        self._layers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _put(self, part: str, vectors: Mapping[str, nn.Parameter]) -> None:
        encoder: Any = self._base.modules[part]
        layer = LearnedEmbedding(encoder.get_input_embeddings(), list(vectors.values()))
        tokenizer = getattr(self._base, _tokenizer_of(part))
        encoder.set_input_embeddings(layer)
        counts = {word: value.shape[0] for word, value in vectors.items()}
        setattr(self._base, _tokenizer_of(part), LearnedTokenizer(tokenizer, counts))
        self._layers[part], self._tokenizers[part] = layer, tokenizer


def attach_embeddings(
    base: BaseModel, embeddings: Sequence[Embedding], *, trainable: bool = False
) -> EmbeddingAttachment:
    """Puts learned words on a base; no weight of it is touched. Attach adapters first, and all words at once.

    A text encoder for which a word has no vectors goes on reading it as it did.

    Args:
        base: The base, perhaps with adapters attached.
        embeddings: The words; none leaves the base as it is.
        trainable: Whether the vectors take gradients.

    Raises:
        AdapterError: A word that is there twice, a text encoder that the base lacks, one of another width, or words are
            attached already; the base is then untouched.
    """
    check_embeddings(base, embeddings)
    parameters = {
        embedding.token: {
            part: nn.Parameter(value.detach().clone().to(base.device, torch.float32), requires_grad=trainable)
            for part, value in embedding.vectors.items()
        }
        for embedding in embeddings
    }
    return EmbeddingAttachment(base, parameters)


def check_embeddings(base: BaseModel, embeddings: Sequence[Embedding]) -> None:
    """Does nothing where words fit a base.

    Raises:
        AdapterError: See `attach_embeddings`.
    """
    seen: set[str] = set()
    for embedding in embeddings:
        where = f"embedding {embedding.token!r}"
        if embedding.token.lower() in seen:
            raise AdapterError("the word is learned twice", where=where, remedy="leave out one of the adapters")
        seen.add(embedding.token.lower())
        for part, value in embedding.vectors.items():
            _check_part(base, part, value, where)


def text_encoders(base: BaseModel) -> list[str]:
    """The text encoders of a base for which words can be learned, sorted by name."""
    found = (part for part in base.modules if part.startswith("text_encoder"))
    return sorted(part for part in found if getattr(base, _tokenizer_of(part), None) is not None)


def _check_part(base: BaseModel, part: str, value: Tensor, where: str) -> None:
    known = text_encoders(base)
    if part not in known:
        allowed = ", ".join(known) or "none"
        problem, remedy = f"the base has no {part!r}", "name the base that the word was learned for"
        raise AdapterError(problem, where=where, allowed=allowed, remedy=remedy)
    encoder: Any = base.modules[part]
    layer = encoder.get_input_embeddings()
    if isinstance(layer, LearnedEmbedding):
        raise AdapterError("words are attached to this base already", where=where, remedy="attach all words at once")
    width = int(layer.weight.shape[1])
    if value.shape[1] != width:
        problem, allowed = f"the vectors of {part} are {value.shape[1]} wide", f"{width} for {base.name!r}"
        raise AdapterError(problem, where=where, allowed=allowed, remedy="name the base that the word was learned for")


def _tokenizer_of(part: str) -> str:
    return part.replace("text_encoder", "tokenizer", 1)
