"""`ImageService`: a queue of requests for images, and the thread that has an engine draw them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.data.images import encode_png
from lora_engine.errors import EngineError
from lora_engine.inference.prompts.prompt import parse_prompt
from registry.entities import now
from registry.home import Home
from tasks.operations.images import DrawRequest, settings_of
from tasks.serving.adapters import ServedAdapters
from tasks.serving.job import Job, JobState, QueueFull, UnknownJob

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.serving.engine import DrawnImages, ImageEngine, ImageJob


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of a service.

    Attributes:
        base: The base model; see `load_base`.
        queue_limit: Number of jobs that may wait.
    """

    base: str = "tiny"
    queue_limit: int = 64


class ImageService:
    """Accepts requests, queues them and draws them; its methods may be called from several threads.

    Args:
        home: The home with the adapters; its folder `serving` gets the images.
        settings: The settings.
        engine: Draws the images.
    """

    def __init__(self, home: Home, settings: ServiceSettings, engine: ImageEngine) -> None:
        self.home, self.settings = home, settings
        self._engine = engine
        self._folder = home.path / "serving"
        self._adapters = ServedAdapters(home, self._folder / "adapters")
        self._jobs: dict[str, Job] = {}
        self._waiting: list[str] = []
        self._latents: dict[str, Tensor] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._draw_all, name="images", daemon=True)
        self._thread.start()

    def submit(self, request: DrawRequest, *, tenant: str = "local") -> Job:
        """Accepts a request and returns its job.

        Args:
            request: The request. Its adapters are `name@version`, `name@alias` or `name`, never files.
            tenant: For whom the images are.

        Raises:
            QueueFull: Too many jobs wait.
            SettingsError: The prompt or a setting cannot be used.
            RegistryError: An adapter does not exist or may not be used now.
        """
        prompt = parse_prompt(request.prompt)
        parse_prompt(request.negative, is_negative=True)
        settings_of(request)
        adapters = tuple(self._adapters.fetch(tag.name)[1] for tag in prompt.adapters)
        job = Job(secrets.token_hex(16), tenant, request, JobState.QUEUED, adapters, now(), steps=request.steps)
        with self._changed:
            if len(self._waiting) >= self.settings.queue_limit:
                raise QueueFull(f"{len(self._waiting)} jobs wait", remedy="send the request again later")
            self._jobs[job.id] = job
            self._waiting.append(job.id)
            self._changed.notify_all()
        return self.job(job.id)

    def job(self, job_id: str) -> Job:
        """Returns a job as it is now.

        Raises:
            UnknownJob: There is none, or its images were deleted.
        """
        with self._changed:
            try:
                job = self._jobs[job_id]
            except KeyError:
                raise UnknownJob(f"unknown job {job_id[:40]!r}") from None
            waiting = self._waiting.index(job_id) + 1 if job_id in self._waiting else 0
            return replace(job, position=waiting)

    def jobs(self, tenant: str | None = None) -> list[Job]:
        """Returns the jobs of a tenant, or of all, in the order of their acceptance."""
        with self._changed:
            chosen = [job_id for job_id, job in self._jobs.items() if tenant in {None, job.tenant}]
        return [self.job(job_id) for job_id in chosen]

    def wait(self, job_id: str, seconds: float | None = None) -> Job:
        """Waits until a job has ended, at most for some seconds, and returns it.

        Raises:
            UnknownJob: There is none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.job(job_id).state.is_final, seconds)
        return self.job(job_id)

    def images(self, job_id: str) -> list[bytes]:
        """Returns the images of a job as PNG files with their settings; an empty list until it is completed.

        Raises:
            UnknownJob: There is none.
        """
        job = self.job(job_id)
        if job.state is not JobState.COMPLETED:
            return []
        first = job.request.seed
        return [self._file(job_id, seed).read_bytes() for seed in range(first, first + job.request.count)]

    def preview(self, job_id: str) -> bytes | None:
        """Returns the first image of a running job as it is now, a PNG file; None before the first step.

        Raises:
            UnknownJob: There is none.
        """
        from lora_engine.data.pixels import to_image

        self.job(job_id)
        latents = self._latents.get(job_id)
        return None if latents is None else encode_png(to_image(self._engine.preview(latents[:1])[0]))

    def cancel(self, job_id: str) -> Job:
        """Cancels a job that waits or runs; a job that has ended stays as it is.

        Raises:
            UnknownJob: There is none.
        """
        with self._changed:
            job = self.job(job_id)
            if not job.state.is_final:
                self._end(job_id, JobState.CANCELED)
        return self.job(job_id)

    def close(self) -> None:
        """Stops after the step that is computed now."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._adapters.close()

    def _draw_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job_id = self._waiting.pop(0)
                self._jobs[job_id] = replace(self._jobs[job_id], state=JobState.RUNNING)
            self._draw([job_id])

    def _draw(self, job_ids: Sequence[str]) -> None:
        results = self._engine.draw([self._engine_job(job_id) for job_id in job_ids])
        for job_id, result in zip(job_ids, results, strict=True):
            if isinstance(result, EngineError):
                self._end(job_id, JobState.FAILED, str(result))
            else:
                self._write(job_id, result)
                self._end(job_id, JobState.COMPLETED)

    def _engine_job(self, job_id: str) -> ImageJob:
        from lora_engine.serving.engine import ImageJob, JobStopped

        job = self._jobs[job_id]

        def on_step(done: int, total: int, latents: Tensor) -> None:
            with self._changed:
                current = self._jobs[job_id]
                if current.state.is_final or self._is_closed:
                    raise JobStopped("the job was canceled", where=job_id)
                self._jobs[job_id] = replace(current, step=done, steps=total)
                self._latents[job_id] = latents
                self._changed.notify_all()

        return ImageJob(
            parse_prompt(job.request.prompt),
            parse_prompt(job.request.negative, is_negative=True),
            settings_of(job.request),
            tuple(self._adapters.fetch(reference) for reference in job.adapters),
            on_step,
        )

    def _write(self, job_id: str, result: DrawnImages) -> None:
        from lora_engine.inference.draw import write_drawn

        first = self._jobs[job_id].request.seed
        for seed, pixels in enumerate(result.pixels, first):
            write_drawn(self._file(job_id, seed), pixels, result.drawing, seed)

    def _file(self, job_id: str, seed: int) -> Path:
        return self._folder / "jobs" / job_id / f"{seed}.png"

    def _end(self, job_id: str, state: JobState, error: str | None = None) -> None:
        with self._changed:
            if self._jobs[job_id].state.is_final:
                return
            if job_id in self._waiting:
                self._waiting.remove(job_id)
            self._jobs[job_id] = replace(self._jobs[job_id], state=state, error=error, ended=now())
            self._latents.pop(job_id, None)
            self._changed.notify_all()
