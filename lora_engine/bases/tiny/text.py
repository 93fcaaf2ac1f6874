"""The embedded base's text encoder: its shape, its tokens, and the heads that teach it to tell the attributes apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.bases.tiny import world
from lora_engine.bases.tiny.tokenizer import LENGTH

WIDTH = 128
NOT_SAID = -1
"""The class of an attribute that a caption does not mention."""


def text_settings(tokenizer: Any) -> dict[str, Any]:
    """The settings of a text transformer over this tokenizer, the same for the base and for CLIP."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 96,
    }


def build_text_encoder(tokenizer: Any) -> Any:
    """An untrained `CLIPTextModel` of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer)))


def build_heads(width: int) -> nn.ModuleDict:
    """One linear classifier per attribute over a vector of `width`."""
    return nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in world.ATTRIBUTES.items()})


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of captions, each int64 [n, 32]."""
    tokens = tokenizer(list(captions), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def label_captions(scenes: Sequence[world.Scene], captions: Sequence[str]) -> dict[str, Tensor]:
    """Attribute -> class that each caption says, int64 [n]; `NOT_SAID` where it is left out.

    A background of the object's colour does not exist, so a word found in the caption is never the other attribute's.
    """
    labels: dict[str, Tensor] = {}
    for name, words in world.ATTRIBUTES.items():
        classes = []
        for scene, text in zip(scenes, captions, strict=True):
            word = getattr(scene, name)
            classes.append(words.index(word) if word in text.replace(",", "").split() else NOT_SAID)
        labels[name] = torch.tensor(classes)
    return labels


def attribute_loss(heads: nn.ModuleDict, vectors: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Sum over the attributes of the cross-entropy of what is said; attributes that nobody mentions count nothing."""
    total = vectors.new_zeros(())
    for name, head in heads.items():
        if bool((labels[name] != NOT_SAID).any()):
            total = total + F.cross_entropy(head(vectors), labels[name], ignore_index=NOT_SAID)
    return total
