"""Attaches learned tokens to a base (textual inversion).

The text encoders keep all of their own rows: a learned token is tokenized to negative ids, and a layer around the input
embedding inserts its vectors. `training` learns tokens; `formats` reads and writes them.
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


def token_pattern(token: str) -> re.Pattern[str]:
    """Returns a case-insensitive pattern that finds a token as a whole word."""
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)


class LearnedTokenizer:
    """A tokenizer with additional learned tokens; each expands to one id per vector.

    Their ids are negative (-1, -2, ...): no vocabulary has them, and encoders that find the end of a text by the
    greatest id (CLIP's older configurations do) still find it.

    Args:
        tokenizer: A tokenizer of transformers; not modified.
        tokens: Token to its number of vectors, in the order of the vectors.
    """

    def __init__(self, tokenizer: Any, tokens: Mapping[str, int]) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        names: list[str] = []
        for token, count in tokens.items():
            parts = [f"<|word:{len(names) + index}|>" for index in range(count)]
            names += parts
            self._patterns.append((token_pattern(token), "".join(parts)))
        self._register(names)
        self._first, self._count = int(self._tokenizer.convert_tokens_to_ids(names[0])), len(names)

    def __call__(self, texts: str | Sequence[str], *arguments: Any, **options: Any) -> Any:
        """Tokenizes texts like the wrapped tokenizer, with negative ids for learned tokens."""
        expanded = self._expand(texts) if isinstance(texts, str) else [self._expand(text) for text in texts]
        encoding = self._tokenizer(expanded, *arguments, **options)
        encoding["input_ids"] = self._to_negative(encoding["input_ids"])
        return encoding

    def __getattr__(self, name: str) -> Any:
        # Only called for missing attributes; during a copy even `_tokenizer` is missing.
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

    def _to_negative(self, ids: Any) -> Any:
        if isinstance(ids, Tensor):
            return torch.where((ids >= self._first) & (ids < self._first + self._count), self._first - 1 - ids, ids)
        if isinstance(ids, list):
            return [self._to_negative(item) for item in ids]
        return self._first - 1 - ids if self._first <= ids < self._first + self._count else ids


class LearnedEmbedding(nn.Module):
    """An input embedding that returns learned vectors for negative ids and the rows of the base layer for others.

    Args:
        base: The wrapped layer.
        vectors: [n, width] each, in the order of their ids.
    """

    def __init__(self, base: nn.Module, vectors: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.base = base
        self.vectors = nn.ParameterList(vectors)

    @property
    def weight(self) -> Tensor:
        """The rows of the wrapped layer."""
        rows: Tensor = self.base.weight  # type: ignore[assignment]
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """Embeds token ids [n, length] as [n, length, width]."""
        plain: Tensor = self.base(ids.clamp(min=0))
        learned = torch.cat(list(self.vectors)).to(plain.dtype)
        return torch.where((ids < 0)[..., None], learned[(-1 - ids).clamp(min=0)], plain)


class EmbeddingAttachment:
    """Learned tokens on a base until `detach`; a context manager that detaches at its end.

    Created by `attach_embeddings`. Adapters that were attached later must be detached first.
    """

    def __init__(self, base: BaseModel, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self._base, self._parameters = base, parameters
        self._layers: dict[str, LearnedEmbedding] = {}
        self._tokenizers: dict[str, Any] = {}
        for part in sorted({part for vectors in parameters.values() for part in vectors}):
            self._wrap(part, {token: vectors[part] for token, vectors in parameters.items() if part in vectors})

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields `words/<token>/<text encoder>` and the vectors."""
        for token, vectors in self._parameters.items():
            for part, value in vectors.items():
                yield f"words/{token}/{part}", value

    def embeddings(self) -> tuple[Embedding, ...]:
        """Returns copies of the current vectors, in float32 on the CPU."""
        return tuple(
            Embedding(token, {part: value.detach().cpu().clone() for part, value in vectors.items()})
            for token, vectors in self._parameters.items()
        )

    def detach(self) -> None:
        """Restores layers and tokenizers. A second call does nothing."""
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

    def _wrap(self, part: str, vectors: Mapping[str, nn.Parameter]) -> None:
        encoder: Any = self._base.modules[part]
        layer = LearnedEmbedding(encoder.get_input_embeddings(), list(vectors.values()))
        tokenizer = getattr(self._base, _tokenizer_of(part))
        encoder.set_input_embeddings(layer)
        counts = {token: value.shape[0] for token, value in vectors.items()}
        setattr(self._base, _tokenizer_of(part), LearnedTokenizer(tokenizer, counts))
        self._layers[part], self._tokenizers[part] = layer, tokenizer


def attach_embeddings(
    base: BaseModel, embeddings: Sequence[Embedding], *, trainable: bool = False
) -> EmbeddingAttachment:
    """Attaches learned tokens to a base without changing its weights. Attach adapters first, and all tokens at once.

    A text encoder for which a token has no vectors reads it as ordinary text.

    Args:
        base: The base, with or without attached adapters.
        embeddings: The learned tokens; none leaves the base unchanged.
        trainable: True if the vectors take gradients.

    Raises:
        AdapterError: A duplicate token, a text encoder that the base lacks or that has another width, or tokens are
            already attached; the base is untouched.
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
    """Raises an error if learned tokens do not match a base.

    Raises:
        AdapterError: See `attach_embeddings`.
    """
    seen: set[str] = set()
    for embedding in embeddings:
        where = f"embedding {embedding.token!r}"
        if embedding.token.lower() in seen:
            raise AdapterError("two adapters have this learned token", where=where, remedy="remove one of the adapters")
        seen.add(embedding.token.lower())
        for part, value in embedding.vectors.items():
            _check_part(base, part, value, where)


def text_encoders(base: BaseModel) -> list[str]:
    """Returns the text encoders of a base for which tokens can be learned, sorted by name."""
    encoders = (part for part in base.modules if part.startswith("text_encoder"))
    return sorted(part for part in encoders if getattr(base, _tokenizer_of(part), None) is not None)


def _check_part(base: BaseModel, part: str, value: Tensor, where: str) -> None:
    known = text_encoders(base)
    if part not in known:
        allowed = ", ".join(known) or "none"
        problem, remedy = f"the base has no {part!r}", "name the base of this token"
        raise AdapterError(problem, where=where, allowed=allowed, remedy=remedy)
    encoder: Any = base.modules[part]
    layer = encoder.get_input_embeddings()
    if isinstance(layer, LearnedEmbedding):
        raise AdapterError("learned tokens are already attached", where=where, remedy="attach all tokens at once")
    width = int(layer.weight.shape[1])
    if value.shape[1] != width:
        problem, allowed = f"the vectors of {part} are {value.shape[1]} wide", f"{width} for {base.name!r}"
        raise AdapterError(problem, where=where, allowed=allowed, remedy="name the base of this token")


def _tokenizer_of(part: str) -> str:
    return part.replace("text_encoder", "tokenizer", 1)
