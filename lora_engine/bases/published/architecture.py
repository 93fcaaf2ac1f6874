"""Defines the description of a published architecture: classes and settings. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ComponentConfig:
    """One component of a pipeline, as in its `config.json`.

    Attributes:
        library: Package of the class: `diffusers` or `transformers`.
        class_name: Name of the class.
        config: Its settings; missing ones take the defaults of the class.
    """

    library: str
    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A published base model without its weights.

    Attributes:
        name: Name for `--base`, such as `sd15` or `sdxl`.
        family: Its family among `bases.families`.
        pipeline: The pipeline class in `model_index.json`.
        components: Networks, text encoders, tokenizers and scheduler by subfolder of a diffusers folder.
        adaptable: The components that can have adapters, in the order of an adapter's names.
        settings: Further entries of `model_index.json`.
        tokenizers: Hub id of the repository of each tokenizer's vocabulary.
    """

    name: str
    family: str
    pipeline: str
    components: Mapping[str, ComponentConfig]
    adaptable: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)
