"""Defines what a server needs of an engine, and the plain engine, which draws one job after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lora_engine.compute import measure_free
from lora_engine.errors import EngineError
from lora_engine.inference.draw import Drawer, DrawSettings
from lora_engine.inference.generate import OnStep, ignore_step
from lora_engine.inference.image_metadata import Drawing
from lora_engine.inference.prompts.prompt import ParsedPrompt


@dataclass(frozen=True)
class ImageJob:
    """One request for images.

    Attributes:
        prompt: The prompt.
        negative: The negative prompt.
        settings: The settings; one image per seed.
        files: File and `name@version` (or file name) of the adapters, in the order of `all_tags`. No file changes.
        on_step: Called after each step of this job; raises `JobStopped` to stop it, and no other job of the batch.
    """

    prompt: ParsedPrompt
    negative: ParsedPrompt
    settings: DrawSettings
    files: tuple[tuple[Path, str], ...] = ()
    on_step: OnStep = ignore_step


@dataclass(frozen=True)
class DrawnImages:
    """The images of a job, float32 [n, 3, height, width] in [-1, 1], and what their files say about them."""

    pixels: Tensor
    drawing: Drawing


class JobStopped(EngineError):
    """A job that was canceled while it was drawn."""


class ImageEngine(Protocol):
    """Draws jobs with one base. One thread calls it."""

    def shares_batch(self, first: ImageJob, other: ImageJob) -> bool:
        """Returns True if both jobs can be drawn in one batch."""
        ...

    def draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        """Draws jobs that share a batch. A job that cannot be drawn gives its error, and the others their images."""
        ...

    def forget(self, file: Path) -> None:
        """Drops all that is kept of an adapter's file, such as one of a withdrawn version."""
        ...

    def preview(self, latents: Tensor) -> Tensor:
        """Returns small images [n, 3, height, width] in [-1, 1] of latents between two steps."""
        ...


class PlainEngine:
    """Draws one job after another, as `loraline generate` does.

    Args:
        base: The base; see `load_base`.
    """

    def __init__(self, base: str) -> None:
        self._drawer = Drawer(base, measure_free=measure_free)

    def shares_batch(self, first: ImageJob, other: ImageJob) -> bool:
        """Returns False."""
        del first, other
        return False

    def draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        """Draws jobs; see `ImageEngine.draw`."""
        results: list[DrawnImages | EngineError] = []
        for job in jobs:
            try:
                results.append(
                    DrawnImages(
                        *self._drawer.draw(
                            job.prompt, job.settings, files=job.files, negative=job.negative, on_step=job.on_step
                        )
                    )
                )
            except EngineError as error:
                results.append(error)
        return results

    def forget(self, file: Path) -> None:
        """Drops an adapter's file."""
        self._drawer.forget(file)

    def preview(self, latents: Tensor) -> Tensor:
        """Returns small images of latents; see `ImageEngine.preview`."""
        return self._drawer.preview(latents)
