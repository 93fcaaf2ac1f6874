"""Watches the steps of images while they are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_engine.errors import DataError
from lora_engine.inference.draw_settings import DrawSettings
from lora_engine.inference.generate import OnStep
from lora_engine.progress import Progress


class StepWatch:
    """Counts the steps of a batch over all of its drawings, and stops at values that no image has.

    Args:
        settings: The settings.
        first: Number of the batch's first image from 0.
        on_step: Called after each step of each drawing.
        progress: Called after each step with the finished steps of all images.
    """

    def __init__(self, settings: DrawSettings, first: int, on_step: OnStep, progress: Progress) -> None:
        self._settings, self._on_step, self._progress = settings, on_step, progress
        self._before = first * settings.image_steps // len(settings.seeds)
        self._rows = 0

    def begin(self, rows: int) -> OnStep:
        """Returns the callback of the next drawing, of that many images."""
        self._before += self._rows * self._settings.steps
        self._rows = rows
        return self._step

    def _step(self, done: int, total: int, latents: Tensor) -> None:
        if not bool(torch.isfinite(latents).all()):
            raise DataError(
                f"step {done} of {total} gives NaN or Inf, so there is no image",
                remedy="lower the weights of the adapters or the guidance, add steps, or choose another sampler",
            )
        self._progress(self._before + done * self._rows, self._settings.image_steps, {})
        self._on_step(done, total, latents)
