"""Defines `TrainingDefaults`: the settings in the pipeline files that `loraline init` and `loraline train` write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainingDefaults:
    """Training settings for the bases of a family; the values here are for a family that declares none.

    alpha is the rank, as in diffusers' and ai-toolkit's examples, so rates of those trainers apply. kohya's scripts
    have alpha 1 by default: their rates do not.

    Attributes:
        resolution: Width and height of the images in pixels, if the base's configuration does not state them.
        learning_rate: Highest learning rate of AdamW.
        rank: Rank of every adapted layer.
        batch: Images per forward pass.
        targets: A target preset.
        gradient_checkpointing: True if a base fills common GPUs without it.
        precision: Precision of the frozen base: `auto` is bf16 on a GPU that computes in it, else fp32.
        reasons: Setting -> why it has the value, with its source: the comment in the file; one short line.
    """

    resolution: int = 1024
    learning_rate: float = 1e-4
    rank: int = 8
    batch: int = 1
    targets: str = "attention"
    gradient_checkpointing: bool = False
    precision: str = "auto"
    reasons: Mapping[str, str] = field(default_factory=dict)
