"""Texts of any length, and words that count more or less, for bases whose text encoders are all CLIP.

The convention is that of A1111's web UI, which kohya's scripts train for: the tokens go into chunks of 75 (77 with
their ends, which is what CLIP reads), each chunk is encoded by itself with a beginning and an end of its own, and the
states of all chunks stand one behind another. What brackets in a text mean is not known here; see
`inference/syntax.py`.
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
Change = Callable[[str, Tensor], Tensor]
# Of a mean beside the size of what it is taken over, in float32.
_ROUNDING = 1e-6


def no_change(suffix: str, states: Tensor) -> Tensor:
    """The states as they are."""
    del suffix
    return states


@runtime_checkable
class ReadsTokens(Protocol):
    """What a base has whose text encoders read chunks of tokens."""

    device: torch.device
    modules: dict[str, nn.Module]

    def tokenizers(self) -> Mapping[str, Any]:
        """The tokenizers by the suffix of their text encoder: an empty one, `_2`."""
        ...

    def encode_tokens(
        self,
        tokens: Mapping[str, Mapping[str, Tensor]],
        size: tuple[int, int] | None = None,
        change: Change = no_change,
    ) -> Conditioning:
        """As `encode_text`, of token ids [n, length] by suffix.

        `change` gets each encoder's suffix and states [n, length, width] before they are put together.
        """
        ...


def encode_long(
    base: object, texts: Sequence[Pieces], size: tuple[int, int] | None = None, *, chunks: int = 1
) -> Conditioning:
    """One row a text, as `BaseModel.encode_text`, of as many chunks as are asked for.

    A text with fewer tokens ends in chunks of an empty text, so that all rows are equally long; a longer one is cut
    off. Chunks are full: a word may stand across two. The pooled embedding is that of the first chunk.

    A token's weight multiplies its state; then the whole chunk is scaled so that the mean of all of its states is what
    it was (the rule `Original` of A1111's web UI), by each text encoder for itself. Chunks in which every weight
    is 1 are left as they are.

    Args:
        base: Any base.
        texts: Each as (piece, weight) in order; pieces are tokenised one by one.
        size: (height, width) in pixels, for families that are told it.
        chunks: How many of each text.

    Raises:
        SettingsError: The base cannot read chunks.
    """
    if not isinstance(base, ReadsTokens):
        raise SettingsError(
            f"the base {getattr(base, 'name', '')!r} cannot read texts in chunks, or with weights",
            allowed="bases whose text encoders are all CLIP: Stable Diffusion 1, 2 and XL",
            remedy="set captions.chunks to 1 and captions.weights to false",
        )
    tokens: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for suffix, tokenizer in base.tokenizers().items():
        encoder: Any = base.modules[f"text_encoder{suffix}"]
        length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
        rows = [_split(tokenizer, pieces, length, chunks) for pieces in texts]
        ids = torch.tensor([chunk for row in rows for chunk in row[0]])
        tokens[suffix] = {"input_ids": ids.to(base.device)}
        if getattr(encoder.config, "use_attention_mask", False):
            used = torch.tensor([chunk for row in rows for chunk in row[2]])
            tokens[suffix]["attention_mask"] = used.to(base.device)
        weights[suffix] = torch.tensor([chunk for row in rows for chunk in row[1]], device=base.device)
    found = base.encode_tokens(tokens, size, lambda suffix, states: weigh(states, weights[suffix]))
    states = found["states"]
    joined = states.reshape(len(texts), chunks * states.shape[1], states.shape[2])
    return Conditioning(
        {name: joined if name == "states" else value[::chunks] for name, value in found.tensors.items()}
    )


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """States [n, length, width] times weights [n, length], each row scaled back to the mean that it had.

    A mean that is nothing but rounding (as behind a layer norm without learned factors) says nothing; such a row is not
    scaled. Gradients take the scale for a constant.
    """
    changed = (weights != 1.0).any(dim=1)
    if not bool(changed.any()):
        return states
    weighed = states * weights[..., None]
    before, after = (value.detach().mean(dim=(1, 2), keepdim=True) for value in (states, weighed))
    rounding = _ROUNDING * states.detach().abs().mean(dim=(1, 2), keepdim=True)
    scale = torch.where((before.abs() > rounding) & (after.abs() > rounding), before / after, 1.0)
    return torch.where(changed[:, None, None], weighed * scale, states)


def _split(
    tokenizer: Any, pieces: Pieces, length: int, chunks: int
) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
    body = length - 2
    ids: list[int] = []
    weights: list[float] = []
    for piece, weight in pieces:
        found = list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        ids += found
        weights += [weight] * len(found)
    if len(ids) > chunks * body:
        text = "".join(piece for piece, _ in pieces)
        _log.warning("the text %r has %d tokens; %d are read", text[:80], len(ids), chunks * body)
    first, last, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: tuple[list[list[int]], list[list[float]], list[list[int]]] = ([], [], [])
    for start in range(0, chunks * body, body):
        part, counts = ids[start : start + body], weights[start : start + body]
        free = body - len(part)
        rows[0].append([first, *part, last, *[pad] * free])
        rows[1].append([1.0, *counts, 1.0, *[1.0] * free])
        rows[2].append([1] * (len(part) + 2) + [0] * free)
    return rows
