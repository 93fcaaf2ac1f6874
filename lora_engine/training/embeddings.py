"""Initializes a learned token's vectors and keeps their norms bounded. See `inference.textual_inversion`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.bases.base import BaseModel
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats.embeddings import Embedding
from lora_engine.inference.textual_inversion import check_embeddings, text_encoders, token_pattern
from lora_engine.seeds import generator
from lora_engine.training.specs.methods import TokenSettings

_SHOWN = 3


def init_token(
    base: BaseModel,
    settings: TokenSettings,
    trigger: str | None,
    class_word: str | None,
    captions: Sequence[str],
    *,
    seed: int,
) -> Embedding:
    """Returns the initial vectors of the learned token, for every text encoder of the base.

    Args:
        base: Base without learned tokens.
        settings: Settings of the token.
        trigger: Token if the settings have none.
        class_word: Initializer if the settings have none.
        captions: Training captions.
        seed: Seed of vectors without an initializer.

    Raises:
        SettingsError: There is no token, it is invalid, no caption contains it, or the base has no text encoder.
    """
    token = settings.token or trigger
    if not token:
        raise SettingsError(
            "there is no token to learn", remedy="set token in the method, or trigger in the caption step"
        )
    if not any(token_pattern(token).search(caption) for caption in captions):
        shown = ", ".join(repr(caption) for caption in captions[:_SHOWN])
        raise SettingsError(
            f"none of the {len(captions)} captions contains the token {token!r}, first {shown}",
            remedy="set the token that the captions use, or set this trigger in the caption step",
        )
    parts = text_encoders(base)
    if not parts:
        raise SettingsError(f"the base {base.name!r} has no text encoder that could learn a token")
    initialiser = settings.initialiser or class_word
    try:
        embedding = Embedding(
            token, {part: _initial_vectors(base, part, initialiser, settings.vectors, seed) for part in parts}
        )
        check_embeddings(base, [embedding])
    except AdapterError as error:
        raise SettingsError(error.problem, where=error.where, allowed=error.allowed, remedy=error.remedy) from error
    return embedding


def norm_decay(
    base: BaseModel, tokens: Mapping[str, nn.Parameter], settings: TokenSettings, rate: float
) -> Callable[[float], None]:
    """Returns a hook that pulls the vectors' norms towards the target; see `TokenSettings.norm_decay`.

    Args:
        base: Base with the learned tokens attached.
        tokens: `words/<token>/<text encoder>` to vectors [n, width], changed in place.
        settings: Strength and target.
        rate: Highest learning rate of the phase; the hook takes the schedule's factor on it.
    """
    targets = {name: settings.norm or float(_rows(base, name.rsplit("/", 1)[1]).norm(dim=-1).mean()) for name in tokens}

    def decay(factor: float) -> None:
        share = min(1.0, settings.norm_decay * rate * factor)
        if share:
            for name, vectors in tokens.items():
                decay_norms(vectors, targets[name], share)

    return decay


@torch.no_grad()
def decay_norms(vectors: Tensor, norm: float, share: float) -> None:
    """Sets rows e of [n, width] to e/|e| (|e| + share (norm - |e|)) in place; zero rows are unchanged."""
    norms = vectors.norm(dim=-1, keepdim=True)
    scale = (norms + share * (norm - norms)) / norms.clamp(min=torch.finfo(vectors.dtype).tiny)
    vectors.mul_(torch.where(norms > 0, scale, torch.ones_like(scale)))


def _initial_vectors(base: BaseModel, part: str, initialiser: str | None, count: int, seed: int) -> Tensor:
    rows = _rows(base, part)
    if initialiser is None:
        draw = generator(seed, "word", part)
        noise = torch.randn(count, rows.shape[1], generator=draw).to(rows.device)
        return rows.mean(dim=0) + noise * rows.std(dim=0)
    tokenizer: Any = getattr(base, part.replace("text_encoder", "tokenizer", 1))
    ids = tokenizer(initialiser, add_special_tokens=False)["input_ids"]
    if not ids:
        raise SettingsError(f"the initialiser {initialiser!r} has no tokens", remedy="set a word that the base knows")
    return rows[[ids[index % len(ids)] for index in range(count)]].clone()


def _rows(base: BaseModel, part: str) -> Tensor:
    encoder: Any = base.modules[part]
    rows: Tensor = encoder.get_input_embeddings().weight
    return rows.detach().float()
