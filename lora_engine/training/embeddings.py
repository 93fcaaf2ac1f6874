"""A word that is about to be learned: what its vectors begin as, and what holds their norms. See `inference.words`."""

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
    """The word as it begins, for every text encoder of the base.

    Args:
        base: With no words attached.
        settings: What the word is to be.
        trigger: The word where the settings name none.
        class_word: What it begins as where the settings name nothing.
        captions: Those that are trained with.
        seed: Of the vectors that begin as nothing.

    Raises:
        SettingsError: There is no word, it is not fit to be one, no caption holds it, or the base has no text encoder.
    """
    token = settings.token or trigger
    if not token:
        raise SettingsError(
            "there is no word to learn", remedy="give the method a token, or the caption step a trigger"
        )
    if not any(token_pattern(token).search(caption) for caption in captions):
        shown = ", ".join(repr(caption) for caption in captions[:_SHOWN])
        raise SettingsError(
            f"none of the {len(captions)} captions holds the word {token!r}, first {shown}",
            remedy="name the word that the captions use, or give the caption step this trigger",
        )
    parts = text_encoders(base)
    if not parts:
        raise SettingsError(f"the base {base.name!r} has no text encoder that could learn a word")
    initialiser = settings.initialiser or class_word
    try:
        found = Embedding(token, {part: _begin(base, part, initialiser, settings.vectors, seed) for part in parts})
        check_embeddings(base, [found])
    except AdapterError as error:
        raise SettingsError(error.problem, where=error.where, allowed=error.allowed, remedy=error.remedy) from error
    return found


def norm_decay(
    base: BaseModel, words: Mapping[str, nn.Parameter], settings: TokenSettings, rate: float
) -> Callable[[float], None]:
    """What pulls the vectors' norms towards that of ordinary words; see `TokenSettings.norm_decay`.

    Args:
        base: With the words attached.
        words: `words/<word>/<text encoder>` to vectors [n, width], changed in place.
        settings: How fast, and to what.
        rate: The highest learning rate of the phase; what is given is called with the schedule's factor on it.
    """
    wanted = {name: settings.norm or float(_rows(base, name.rsplit("/", 1)[1]).norm(dim=-1).mean()) for name in words}

    def after(factor: float) -> None:
        share = min(1.0, settings.norm_decay * rate * factor)
        if share:
            for name, vectors in words.items():
                decay_norms(vectors, wanted[name], share)

    return after


@torch.no_grad()
def decay_norms(vectors: Tensor, norm: float, share: float) -> None:
    """Makes rows e <- e/|e| (|e| + share (norm - |e|)) for each row of [n, width], in place; a row of zeros stays."""
    norms = vectors.norm(dim=-1, keepdim=True)
    scale = (norms + share * (norm - norms)) / norms.clamp(min=torch.finfo(vectors.dtype).tiny)
    vectors.mul_(torch.where(norms > 0, scale, torch.ones_like(scale)))


def _begin(base: BaseModel, part: str, initialiser: str | None, count: int, seed: int) -> Tensor:
    rows = _rows(base, part)
    if initialiser is None:
        draw = generator(seed, "word", part)
        noise = torch.randn(count, rows.shape[1], generator=draw).to(rows.device)
        return rows.mean(dim=0) + noise * rows.std(dim=0)
    tokenizer: Any = getattr(base, part.replace("text_encoder", "tokenizer", 1))
    ids = tokenizer(initialiser, add_special_tokens=False)["input_ids"]
    if not ids:
        raise SettingsError(f"the initialiser {initialiser!r} has no tokens", remedy="name a word that the base knows")
    return rows[[ids[place % len(ids)] for place in range(count)]].clone()


def _rows(base: BaseModel, part: str) -> Tensor:
    encoder: Any = base.modules[part]
    rows: Tensor = encoder.get_input_embeddings().weight
    return rows.detach().float()
