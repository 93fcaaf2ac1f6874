"""Learned weights: the weighted sum that minimizes the denoising loss on a few images (see `merging.learned`)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, FiniteFloat

from lora_engine.merging.methods.method import Combination, Gram
from lora_engine.merging.methods.sums import linear
from lora_engine.merging.spec import MergeOptions, Weight

if TYPE_CHECKING:
    from lora_engine.adapters import Adapter
    from lora_engine.bases.base import BaseModel


class Learned(MergeOptions):
    """The weighted sum, with weights optimized for the denoising loss on a few images.

    Attributes:
        per: One weight per adapter, or one per block of the model (`unet.down_blocks.1`, `text_encoder`).
        steps: Steps of Adam.
        learning_rate: Learning rate of Adam.
        timesteps: Timesteps per image, in the middles of equal parts of the schedule.
        pull: Weight of the squared distance to the initial weights, added to the loss.
    """

    method: Literal["learned"] = "learned"
    per: Literal["adapter", "block"] = "adapter"
    steps: int = Field(default=30, ge=1, le=100_000)
    learning_rate: FiniteFloat = Field(default=0.05, gt=0.0)
    timesteps: int = Field(default=4, ge=1, le=1000)
    pull: FiniteFloat = Field(default=0.0, ge=0.0)


def keep_weights(weights: Sequence[float], gram: Gram, **options: Any) -> list[float]:
    """Returns the weights, which `learn` computed with the options."""
    return linear(weights, gram)


def learn(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    base: BaseModel,
    dataset: Path,
    work: Path | None,
    options: Learned,
    seed: int,
) -> list[Weight]:
    """Returns the learned weights; `work` caches encoded images and texts."""
    from lora_engine.merging.learned import denoising_losses, learn_weights

    with tempfile.TemporaryDirectory() as temporary:
        trains_text = any(name.startswith("text_encoder") for adapter in adapters for name in adapter.modules)
        losses = denoising_losses(
            base, dataset, work or Path(temporary), seed=seed, timesteps=options.timesteps, trains_text=trains_text
        )
        return learn_weights(adapters, weights, base, losses, options)


LEARNED = Combination(
    spec=Learned, title="weighted sum, with weights learned on images", coefficients=keep_weights, learn=learn
)
