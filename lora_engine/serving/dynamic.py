"""The dynamic engine: adapters by request, different ones in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor

from lora_engine.adapters.rows import RowAdapters
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.errors import EngineError
from lora_engine.inference.composition import compose
from lora_engine.serving.adapter_cache import AdapterCache
from lora_engine.serving.batch import (
    CachedDrawer,
    OwnRows,
    SharedComposition,
    attempt,
    draw_together,
)
from lora_engine.serving.engine import DrawnImages, ImageJob
from lora_engine.serving.engines import DynamicOptions
from lora_engine.serving.grouping import batches_of, has_one_pass, have_same_adapters


class DynamicEngine:
    """Draws jobs with the adapters that each names.

    A job alone is drawn as `loraline generate` draws it, with the same bytes. Jobs of one batch are predicted together;
    their images equal those within rounding. Jobs with the same adapters of constant weights share merged weights; jobs
    with different LoRAs have them on their own rows.

    Args:
        base: The base, or a name for `load_base`.
        options: The options.
    """

    def __init__(self, base: str | BaseModel, options: DynamicOptions | None = None) -> None:
        self.options = options or DynamicOptions()
        self._base = load_base(base) if isinstance(base, str) else base
        self._adapters = AdapterCache(self._base, self.options.cache_bytes)
        self._drawer = CachedDrawer(self._base, self._adapters)
        self._packs_rows = False

    def shares_batch(self, first: ImageJob, other: ImageJob) -> bool:
        """Returns True for jobs of one size, sampler and number of steps whose adapters can share a batch.

        Scales of guidance, prompts, seeds and images to start from may differ. False if one needs a pass of its own:
        enlarged images, options of other bases, adapters of kinds without products by row.
        """
        if not (has_one_pass(first, other, self.options.max_images) and self._have_same_options(first, other)):
            return False
        return have_same_adapters(first, other) or (self._has_rows(first) and self._has_rows(other))

    def draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        """Draws jobs; see `ImageEngine.draw`. More images than `max_images` are drawn in several batches."""
        batches = batches_of(jobs, self.shares_batch, self.options.max_images)
        return list(chain.from_iterable(map(self._draw, batches)))

    def forget(self, file: Path) -> None:
        """Drops an adapter's file."""
        self._adapters.forget(file)

    def preview(self, latents: Tensor) -> Tensor:
        """Returns small images of latents; see `ImageEngine.preview`."""
        return self._drawer.preview(latents)

    def _draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        if len(jobs) == 1:
            return [attempt(self._drawer, jobs[0])]
        if all(have_same_adapters(jobs[0], job) for job in jobs):
            return self._draw_alike(jobs)
        with RowAdapters(self._base) as rows:
            mode = OwnRows(self._base, rows, self._adapters)
            results = draw_together(self._base, self._adapters, jobs, mode)
        self._packs_rows = self._packs_rows or mode.packs_rows
        return results

    def _draw_alike(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        try:
            bundles = [self._adapters.bundle(file) for file, _ in jobs[0].files]
            pairs = list(zip(jobs[0].prompt.adapters, bundles, strict=True))
            with compose(self._base, pairs, engine=jobs[0].settings.engine) as composition:
                mode = SharedComposition(self._base, composition)
                return draw_together(self._base, self._adapters, jobs, mode)
        except EngineError as error:
            return [error] * len(jobs)

    def _have_same_options(self, *jobs: ImageJob) -> bool:
        """Returns True if the adapters of two jobs were trained with the same options of the base."""
        try:
            first, other = (
                options_of_cards([self._adapters.bundle(file).card for file, _ in job.files]) for job in jobs
            )
        except EngineError:
            return False  # drawn alone, the job gives this error
        return first == other

    def _has_rows(self, job: ImageJob) -> bool:
        return not self._packs_rows and all(self._adapters.row_obstacle(file) is None for file, _ in job.files)
