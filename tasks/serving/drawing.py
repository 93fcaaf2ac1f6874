"""`DrawingThread`: takes jobs from the board in batches, has the engine draw them, and writes their images."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import EngineError, WordedError
from lora_engine.inference.image_files import encode_marked
from lora_engine.inference.image_metadata import source_type_of
from lora_engine.inference.prompts.prompt import parse_prompt
from registry.errors import DiskFull, HomeError, RegistryError
from tasks.operations.draw_request import settings_of
from tasks.serving.adapters import ServedAdapters
from tasks.serving.board import JobBoard
from tasks.serving.job import Failure, Job, JobState
from tasks.serving.metrics import ServingMetrics
from tasks.serving.records import JobRecords
from tasks.serving.results import JobImages
from tasks.serving.safety import SafetyHook, require_safe
from tasks.serving.settings import ServiceSettings

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.serving.engine import DrawnImages, ImageEngine, ImageJob

_logger = logging.getLogger(__name__)
_IDLE = 1.0
"""Seconds between two looks at the registry while nothing is drawn."""
_PRUNED_EVERY = 20.0
"""Seconds between two looks at the age and the size of results."""


@dataclass(frozen=True)
class Parts:
    """What the thread works with.

    Attributes:
        settings: The settings.
        engine: Draws the images.
        board: The jobs.
        records: The jobs on the disk.
        adapters: The adapters.
        results: The images.
        metrics: The metrics.
        hook: May refuse images; None lets all out.
        suffix: Tags of the adapters that are in every image, added to each prompt.
    """

    settings: ServiceSettings
    engine: ImageEngine
    board: JobBoard
    records: JobRecords
    adapters: ServedAdapters
    results: JobImages
    metrics: ServingMetrics
    hook: SafetyHook | None
    suffix: str = ""


class DrawingThread(threading.Thread):
    """The only thread that calls the engine.

    Args:
        parts: What it works with.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(name="images", daemon=True)
        self._parts = parts
        self._pruned = time.monotonic()

    def run(self) -> None:
        """Draws until the board closes."""
        board = self._parts.board
        while not board.is_closing:
            self._refuse_unusable()
            job = board.take(_IDLE)
            if job is None:
                board.settle()
            else:
                self._draw_batch(job)
            self._clean()

    def _draw_batch(self, first: Job) -> None:
        """Draws a job, with those of any tenant that share a batch with it."""
        engine_job = self._prepare(first)
        if engine_job is None:
            return
        batch = [(first, engine_job)]
        prepared: dict[str, ImageJob] = {}
        while (more := self._find_similar(batch, prepared)) is not None:
            batch.append(more)
        started = time.monotonic()
        self._parts.metrics.batch_images.observe(sum(job.request.count for job, _ in batch))
        try:
            results = self._parts.engine.draw([engine_job for _, engine_job in batch])
        except Exception:  # an error of torch or of the engine fails its batch; the queue continues
            _logger.exception("a batch of %d jobs failed", len(batch))
            results = [EngineError("the images could not be drawn; see the log of the server")] * len(batch)
        self._parts.metrics.drawing_seconds.observe(time.monotonic() - started)
        for (job, _), result in zip(batch, results, strict=True):
            self._finish(job, result)

    def _find_similar(
        self, batch: Sequence[tuple[Job, ImageJob]], prepared: dict[str, ImageJob]
    ) -> tuple[Job, ImageJob] | None:
        """Takes the next job that shares the batch; only the first of each tenant is asked, in fair order.

        Args:
            batch: The batch.
            prepared: Jobs that were prepared for an earlier question; grows.
        """
        settings, board = self._parts.settings, self._parts.board
        room = settings.batch_images - sum(job.request.count for job, _ in batch)
        if room <= 0:
            return None
        for job in board.heads(settings.batch_window):
            if job.request.count > room:
                continue
            other = prepared.get(job.id) or self._prepare(job)
            if other is None:
                continue
            prepared[job.id] = other
            if self._parts.engine.shares_batch(batch[0][1], other):
                claimed = board.claim(job.id)
                if claimed is not None:
                    return claimed, other
        return None

    def _prepare(self, job: Job) -> ImageJob | None:
        """Returns a job for the engine; ends it, and returns None, if its adapters may not be used any more."""
        try:
            hits = self._parts.adapters.hits
            files = tuple(self._parts.adapters.fetch(reference) for reference in job.adapters)
            found = self._parts.adapters.hits - hits
            self._parts.metrics.adapter_files.labels("hit").inc(found)
            self._parts.metrics.adapter_files.labels("miss").inc(len(files) - found)
            return self._engine_job(job, files)
        except (EngineError, RegistryError) as error:
            self._parts.board.end(job.id, JobState.FAILED, Failure.of(error))
            return None

    def _engine_job(self, job: Job, files: tuple[tuple[Path, str], ...]) -> ImageJob:
        from lora_engine.serving.engine import ImageJob, JobStopped

        board, engine, is_shown = self._parts.board, self._parts.engine, self._parts.hook is None
        is_composite = job.request.mask is not None or job.request.only_regions

        def on_step(done: int, total: int, latents: Tensor) -> None:
            if not board.advance(job.id, done, total):
                raise JobStopped("the job was stopped", where=job.id)
            if is_shown and board.wants_preview(job.id):
                from lora_engine.data.pixels import to_image

                image = to_image(engine.preview(latents[:1])[0])
                board.show_preview(job.id, encode_marked(image, source_type_of(is_composite)))

        return ImageJob(
            parse_prompt(job.request.prompt + self._parts.suffix),
            parse_prompt(job.request.negative, is_negative=True),
            settings_of(job.request),
            files,
            on_step,
        )

    def _finish(self, job: Job, result: DrawnImages | EngineError) -> None:
        from lora_engine.serving.engine import JobStopped

        board = self._parts.board
        if isinstance(result, JobStopped):
            board.requeue(job.id)  # unless a client canceled it
            return
        try:
            if isinstance(result, EngineError):
                raise result
            size = self._release(job, result)
        except (EngineError, RegistryError) as error:
            if isinstance(error, DiskFull):
                _logger.error("job %s: %s", job.id, error)  # noqa: TRY400 (an operator needs no traceback)
            board.end(job.id, JobState.FAILED, Failure.of(error))
            return
        if not board.end(job.id, JobState.COMPLETED, size=size):
            self._parts.results.delete(job.id)  # canceled meanwhile

    def _release(self, job: Job, result: DrawnImages) -> int:
        """Writes the images if their adapters are still usable and the hook lets them out; returns their size."""
        for reference in job.adapters:
            self._parts.adapters.resolve(reference)
        if self._parts.hook is not None:
            from lora_engine.data.pixels import to_image

            require_safe(self._parts.hook, [to_image(pixels) for pixels in result.pixels], job)
        return self._parts.results.write(job, result)

    def _refuse_unusable(self) -> None:
        """Ends waiting jobs whose adapters were withdrawn or revoked, and drops these from all caches."""
        waiting = self._parts.board.waiting()
        try:
            unusable, files = self._parts.adapters.find_unusable(ref for job in waiting for ref in job.adapters)
        except RegistryError as error:
            _logger.warning("the registry cannot be read: %s", error)
            return
        for file in files:
            self._parts.engine.forget(file)
        for job in waiting:
            cause: WordedError | None = next((unusable[ref] for ref in job.adapters if ref in unusable), None)
            if cause is not None:
                self._parts.board.end(job.id, JobState.FAILED, Failure.of(cause))

    def _clean(self) -> None:
        """Stores what could not be stored, and deletes what is old or too much."""
        self._parts.board.save()
        if time.monotonic() - self._pruned < _PRUNED_EVERY:
            return
        self._pruned = time.monotonic()
        settings = self._parts.settings
        try:
            self._parts.adapters.trim()
            self._parts.results.prune(self._parts.records, hours=settings.keep_hours, limit=settings.keep_bytes)
        except HomeError as error:
            _logger.warning("old results are not deleted yet: %s", error)
