"""Encodes texts of any length, and weighted words, for bases whose text encoders are all CLIP.

Follows A1111's web UI, as kohya's scripts do: tokens are split into chunks of 75 (77 with the start and end tokens that
CLIP reads), each chunk is encoded separately, and the states of all chunks are concatenated.
`inference/prompts/emphasis.py` parses brackets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import SettingsError

_log = logging.getLogger(__name__)

Pieces = Sequence[tuple[str, float]]
StateChange = Callable[[str, Tensor], Tensor]
# Rounding error of a float32 mean, relative to the mean absolute value.
_ROUNDING = 1e-6


def no_change(suffix: str, states: Tensor) -> Tensor:
    """Returns the states unchanged."""
    del suffix
    return states


@runtime_checkable
class ReadsTokens(Protocol):
    """The protocol of bases whose text encoders read chunks of tokens."""

    device: torch.device
    modules: dict[str, nn.Module]

    def tokenizers(self) -> Mapping[str, Any]:
        """Returns the tokenizers by the suffix of their text encoder: empty, `_2`."""
        ...

    def encode_tokens(
        self,
        tokens: Mapping[str, Mapping[str, Tensor]],
        size: tuple[int, int] | None = None,
        change: StateChange = no_change,
    ) -> Conditioning:
        """Encodes token ids [n, length] by suffix; see `BaseModel.encode_text`.

        `change` transforms the states [n, length, width] of each encoder, named by its suffix, before they are joined.
        """
        ...


def encode_long(
    base: object, texts: Sequence[Pieces], size: tuple[int, int] | None = None, *, chunks: int = 1
) -> Conditioning:
    """Encodes texts of several chunks, one row per text; see `BaseModel.encode_text`.

    Shorter texts are padded with chunks of an empty text; longer ones are truncated. Chunks are full: a word may be
    split across two. The pooled embedding is that of the first chunk.

    A token's weight multiplies its state; then the chunk is scaled to restore the mean of its states (A1111's rule
    `Original`), separately for each text encoder. Chunks without weights are unchanged.

    Args:
        base: Any base.
        texts: Pairs (piece, weight) of each text, in order; pieces are tokenized one by one.
        size: (height, width) in pixels, for families that need it.
        chunks: Chunks per text.

    Raises:
        SettingsError: The base cannot read chunks.
    """
    remedy = "set captions.chunks to 1 and captions.weights to false"
    return _encode(base, [[pieces] for pieces in texts], size, chunks, remedy=remedy)


def encode_divided(
    base: object, texts: Sequence[Sequence[Pieces]], size: tuple[int, int] | None = None, *, chunks: int
) -> Conditioning:
    """Encodes texts that BREAK divides, one row per text: each division begins a chunk. See `encode_long`.

    Raises:
        SettingsError: The base cannot read chunks.
    """
    return _encode(base, texts, size, chunks, remedy="write the prompt without brackets and BREAK")


def count_chunks(base: object, divisions: Sequence[Pieces]) -> int:
    """Returns the chunks that hold a whole text; 1 for a base that cannot read chunks."""
    if not isinstance(base, ReadsTokens):
        return 1
    return max(
        sum(_chunks_of(tokenizer, pieces, _length(base, suffix, tokenizer) - 2) for pieces in divisions)
        for suffix, tokenizer in base.tokenizers().items()
    )


def _length(base: ReadsTokens, suffix: str, tokenizer: Any) -> int:
    encoder: Any = base.modules[f"text_encoder{suffix}"]
    return min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))


def _encode(
    base: object, texts: Sequence[Sequence[Pieces]], size: tuple[int, int] | None, chunks: int, *, remedy: str
) -> Conditioning:
    if not isinstance(base, ReadsTokens):
        raise SettingsError(
            f"the base {getattr(base, 'name', '')!r} cannot encode texts in chunks or with weights",
            allowed="bases whose text encoders are all CLIP: Stable Diffusion 1, 2 and XL",
            remedy=remedy,
        )
    tokens: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for suffix, tokenizer in base.tokenizers().items():
        encoder: Any = base.modules[f"text_encoder{suffix}"]
        length = _length(base, suffix, tokenizer)
        rows = [_split_divisions(tokenizer, divisions, length, chunks) for divisions in texts]
        ids = torch.tensor([chunk for row in rows for chunk in row[0]])
        tokens[suffix] = {"input_ids": ids.to(base.device)}
        if getattr(encoder.config, "use_attention_mask", False):
            attended = torch.tensor([chunk for row in rows for chunk in row[2]])
            tokens[suffix]["attention_mask"] = attended.to(base.device)
        weights[suffix] = torch.tensor([chunk for row in rows for chunk in row[1]], device=base.device)
    encoded = base.encode_tokens(tokens, size, lambda suffix, states: weigh(states, weights[suffix]))
    states = encoded["states"]
    joined = states.reshape(len(texts), chunks * states.shape[1], states.shape[2])
    return Conditioning(
        {name: joined if name == "states" else value[::chunks] for name, value in encoded.tensors.items()}
    )


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """Multiplies states [n, length, width] by weights [n, length] and restores the mean of each row.

    A row whose mean is only rounding error (as after a layer norm without learned factors) is not scaled. Gradients
    treat the scale as a constant.
    """
    changed = (weights != 1.0).any(dim=1)
    if not bool(changed.any()):
        return states
    weighed = states * weights[..., None]
    before, after = (value.detach().mean(dim=(1, 2), keepdim=True) for value in (states, weighed))
    rounding = _ROUNDING * states.detach().abs().mean(dim=(1, 2), keepdim=True)
    scale = torch.where((before.abs() > rounding) & (after.abs() > rounding), before / after, 1.0)
    return torch.where(changed[:, None, None], weighed * scale, states)


_Rows = tuple[list[list[int]], list[list[float]], list[list[int]]]
"""Ids, weights and attention mask of each chunk."""


def _split_divisions(tokenizer: Any, divisions: Sequence[Pieces], length: int, chunks: int) -> _Rows:
    """Returns the chunks of a text; the last division takes those that the others leave."""
    rows: _Rows = ([], [], [])
    for index, pieces in enumerate(divisions):
        left = chunks - len(rows[0])
        is_last = index == len(divisions) - 1
        count = left if is_last else min(left, _chunks_of(tokenizer, pieces, length - 2))
        ids, weights, attended = _split(tokenizer, pieces, length, count)
        rows[0].extend(ids)
        rows[1].extend(weights)
        rows[2].extend(attended)
    return rows


def _chunks_of(tokenizer: Any, pieces: Pieces, body: int) -> int:
    count = sum(len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]) for piece, _ in pieces)
    return max(1, -(-count // body))


def _split(tokenizer: Any, pieces: Pieces, length: int, chunks: int) -> _Rows:
    body = length - 2
    ids: list[int] = []
    weights: list[float] = []
    for piece, weight in pieces:
        piece_ids = list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        ids += piece_ids
        weights += [weight] * len(piece_ids)
    if len(ids) > chunks * body:
        text = "".join(piece for piece, _ in pieces)
        _log.warning("the text %r has %d tokens; the base reads the first %d", text[:80], len(ids), chunks * body)
    first, last, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: _Rows = ([], [], [])
    for start in range(0, chunks * body, body):
        part, counts = ids[start : start + body], weights[start : start + body]
        free = body - len(part)
        rows[0].append([first, *part, last, *[pad] * free])
        rows[1].append([1.0, *counts, 1.0, *[1.0] * free])
        rows[2].append([1] * (len(part) + 2) + [0] * free)
    return rows
