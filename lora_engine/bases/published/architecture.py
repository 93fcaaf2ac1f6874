"""What one published architecture is: the classes of its parts and their settings. No weights, no torch, no tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ComponentConfig:
    """One part of a pipeline, as its `config.json` would describe it.

    Attributes:
        library: `diffusers` or `transformers`: where the class lives.
        class_name: Name of the class.
        config: Its settings; what is left out is the class's own default.
    """

    library: str
    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A published base model without its weights.

    Attributes:
        name: As `--base` says it: `sd15`, `sdxl`.
        family: The family among `bases.families` that computes it.
        pipeline: The pipeline class that `model_index.json` names.
        components: By sub-folder of a diffusers folder: networks, text encoders, tokenizers, scheduler.
        adaptable: The components that carry adapters, in the order of their names in an adapter.
        settings: What else `model_index.json` says of the pipeline.
        tokenizers: Hub ids of the repositories that hold the vocabulary of each tokenizer.
    """

    name: str
    family: str
    pipeline: str
    components: Mapping[str, ComponentConfig]
    adaptable: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)
