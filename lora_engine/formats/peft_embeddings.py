"""Renames the factors of embedding layers to PEFT's own suffixes; some are also transposed or negated.

A delta does not know its layer's type, so embedding layers are recognized by their usual names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_engine.formats.key_layouts.lora import EMBEDDING
from lora_engine.formats.key_layouts.oft import ANGLES, OF_EMBEDDING

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDINGS = re.compile(
    r"(.*[./])?(token_embedding|position_embedding|embed_tokens|shared|word_embeddings|position_embeddings"
    r"|class_embedding|relative_attention_bias|wte|wpe)"
)
_FACTOR = {"lora_A.weight": "down", "lora_B.weight": "up"}
_SUFFIXES = {factor: suffix for suffix, factor in EMBEDDING.items()}


def with_embedding_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a PEFT adapter, with those of embedding layers in PEFT's form."""
    return dict(_embedding_form(key, tensor) for key, tensor in tensors.items())


def _embedding_form(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    for suffix, factor in _FACTOR.items():
        module = key.removesuffix(f".{suffix}")
        if module != key and _EMBEDDINGS.fullmatch(module):
            return f"{module}.{_SUFFIXES[factor]}", tensor.T.contiguous()
    module = key.removesuffix(f".{ANGLES}")
    if module != key and _EMBEDDINGS.fullmatch(module):
        return f"{module}.{OF_EMBEDDING}", -tensor
    return key, tensor
